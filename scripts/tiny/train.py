"""Train the tiny tri-mode checkpoint from one seed: tokenizer, network, draft adapter, files.

    python -m scripts.tiny.train --out checkpoints/tiny

The network is the project's PyTorch reference. One sequence carries two streams, ``[clean | noisy]``. The clean stream
is causal and learns autoregression. The noisy stream consists of blocks that learn to fill masks; a block attends to
the clean tokens before its start and to itself in both directions, as in decoding. Rows and blocks are packed into bins
of a fixed length, so that the compiled step has one shape and little padding.

The length of a run is a number of steps, so the same seed repeats the same run. If other processes run on the machine,
set ``OMP_WAIT_POLICY=PASSIVE``: with a third busy process, two spinning threads are ten times slower.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from scripts.tiny.corpus import REVISED_SHARES, Conversation, Corpus, held_out_records
from trimode.model.reference.network import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel

VOCABULARY = 768
SPECIAL_IDS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|im_start|>": 10,
    "<|im_end|>": 11,
    "<think>": 12,
    "</think>": 13,
    "<|mask|>": 100,
}
RESERVED_IDS = [*range(3, 10), *range(14, 20)]  # <SPECIAL_n>, as in the family: no ordinary token has an id below 20
END, MASK = SPECIAL_IDS["<|im_end|>"], SPECIAL_IDS["<|mask|>"]
CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
    {%- set system, turns = '', messages -%}
{%- endif -%}
{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- for turn in turns -%}
    {%- if turn['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\\n<think></think>' + turn['content'].split('</think>')[-1] + '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n' if enable_thinking | default(false) else '<think></think>') -}}
{%- endif -%}
"""

BIN = 384  # tokens of an ordinary bin; longer rows go into bins of LONG_BIN tokens
LONG_BIN = 768
BATCH_TOKENS = 3840
NOISY_SHARE = 0.5  # least share of a bin's tokens that belong to noisy blocks
WHOLE_MASKED = 0.25  # share of noisy blocks that are entirely masked, as in a one-pass draft
PREFIX_KNOWN = 0.2  # share of noisy blocks that are known up to a position and masked after it
BLOCK_SIZES = {8: 0.35, 16: 0.40, 32: 0.25}
PAST_END_WEIGHT = 0.1  # loss weight of end tokens after the first: drafts must not end answers too early
FAR = -1  # target of a mask beyond the stage's reach: the batch's token frequencies in place of one token
FAR_WEIGHT = 0.2
ADAPTER_RANK = 64
# Without AVX-512, a bfloat16 product takes forty times as long as one in fp32.
PRODUCTS = torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32


@dataclass(frozen=True)
class Stage:
    """One run of the optimiser, from warm-up to a rate of zero, on its own corpus."""

    steps: int
    peak: float = 1.0
    shares: dict[str, float] = field(default_factory=dict)  # of kinds; the corpus's defaults where missing
    several: float = 0.04  # share of prompts with two questions
    whole: float = WHOLE_MASKED
    densest: float = 1.0  # largest masked share of a noisy block that is not entirely masked
    reach: int = max(BLOCK_SIZES)  # positions after the last known token within which a mask learns its own token


STAGES = (
    Stage(5500),
    Stage(750, 0.4, REVISED_SHARES, 0.10),  # lower rates, more of the kinds that scored low
    # No almost entirely masked blocks, then unsure of far masks: far drafts are left to the adapter.
    Stage(400, 0.4, REVISED_SHARES, 0.10, whole=0.0, densest=0.7),
    Stage(160, 0.4, REVISED_SHARES, 0.10, reach=10),
    Stage(80, 0.4, REVISED_SHARES, 0.10, reach=8),
)
ONE_SHOT = Stage(600, shares=REVISED_SHARES, whole=1.0)  # trains the draft adapter on the finished base


def progress(message: str, console: Console = Console()) -> None:  # noqa: B008
    console.print(f"[{time.strftime('%H:%M:%S')}] {message}", highlight=False, markup=False, soft_wrap=True)


def keep_freed_memory() -> None:
    """Stop glibc from returning large freed tensors to the system. Otherwise page faults take half of a step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


# --- tokenizer


def train_tokenizer(conversations: Iterable[Conversation]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits. Special tokens have the family's ids; ordinary tokens fill the other ids."""
    specials = SPECIAL_IDS | {f"<SPECIAL_{index}>": index for index in RESERVED_IDS}
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pieces
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (f"system\nuser\nassistant\n{text['content']}" for row in conversations for text in row.messages())
    trained.train_from_iterator(texts, trainer)
    state = json.loads(trained.to_str())["model"]
    ordinary = sorted(state["vocab"], key=state["vocab"].get)
    free = (index for index in range(VOCABULARY) if index not in specials.values())
    vocabulary = specials | dict(zip(ordinary, free, strict=False))
    assert len(ordinary) + len(specials) == VOCABULARY, "the corpus is too small for the vocabulary"

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge) for merge in state["merges"]]))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    visible = ("<think>", "</think>")  # part of the text, so decoding keeps them
    for token in sorted(specials, key=specials.get):
        tokenizer.add_tokens([AddedToken(token, special=token not in visible, normalized=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        mask_token="<|mask|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


# --- rows and bins


@dataclass
class Row:
    """A tokenised conversation. answers: the [first, end) spans that the model generates, end token included."""

    ids: list[int]
    answers: list[tuple[int, int]]
    kind: str = ""


def tokenise(conversation: Conversation, encode: Callable[[str], list[int]]) -> Row:
    """Apply the chat template and keep the spans of answers; ``check_template`` checks it against the real template."""
    ids, answers = encode(f"<|im_start|>system\n{conversation.system}<|im_end|>\n"), []
    for turn in conversation.turns:
        ids += encode(f"<|im_start|>user\n{turn.problem.prompt}<|im_end|>\n<|im_start|>assistant\n{turn.opening}")
        start = len(ids)
        ids += [*encode(turn.reply), END]
        answers.append((start, len(ids)))
        ids += encode("\n")
    return Row(ids, answers, conversation.turns[-1].problem.kind)


def check_template(tokenizer: PreTrainedTokenizerFast, conversations: Iterable[Conversation]) -> None:
    """Check that training rows equal the chat template's rendering of the same messages."""
    for conversation in conversations:
        if any(turn.thinking for turn in conversation.turns):
            continue
        expected = tokenizer.apply_chat_template(conversation.messages(), tokenize=True, return_dict=False)
        assert expected == tokenise(conversation, encoder_of(tokenizer)).ids, conversation


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Bin:
    """One packed sequence: parallel columns with one entry a token."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # row that a token belongs to
    blocks: list[int] = field(default_factory=list)  # noisy block that a token belongs to; 0: clean
    limits: list[int] = field(default_factory=list)  # clean tokens before this position are visible
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of the loss; negative in the noisy stream

    def add_clean(self, row: Row, index: int) -> None:
        count = len(row.ids)
        weights = [0.0] * count
        for first, end in row.answers:  # position i predicts i + 1
            weights[first - 1 : end - 1] = [1.0] * (end - first)
        self.ids += row.ids
        self.positions += range(count)
        self.rows += [index] * count
        self.blocks += [0] * count
        self.limits += range(1, count + 1)
        self.targets += [*row.ids[1:], END]
        self.weights += weights

    def add_noisy(self, row: Row, index: int, block: int, size: int, rng: random.Random, stage: Stage) -> None:
        """Add a block that starts anywhere in an answer. Its first token is the pending token and is never masked."""
        first, end = rng.choices(row.answers, [last - start for start, last in row.answers])[0]
        start = first if rng.random() < 0.15 else rng.randrange(first, max(first + 1, end - 1))
        text = [*row.ids[start:end], *[END] * size][:size]
        draw = rng.random()
        if draw < stage.whole:
            masked = [True] * size
        elif draw < stage.whole + PREFIX_KNOWN:
            known = rng.randrange(max(1, int(size * (1 - stage.densest))), size)
            masked = [place >= known for place in range(size)]
        else:
            ratio = rng.random() * stage.densest
            masked = [rng.random() < ratio for _ in range(size)]
        masked[0] = False
        self.ids += [MASK if hidden else token for token, hidden in zip(text, masked, strict=True)]
        self.positions += range(start, start + size)
        self.rows += [index] * size
        self.blocks += [block] * size
        self.limits += [start] * size
        last_known = 0
        for place, hidden in enumerate(masked):
            last_known = last_known if hidden else place
            far = place - last_known > stage.reach
            self.targets.append(FAR if far else text[place])
            self.weights.append(-hidden * (FAR_WEIGHT if far else 1.0 if start + place < end else PAST_END_WEIGHT))

    def fill(self, rows: list[Row], size: int, rng: random.Random, stage: Stage) -> None:
        """Add the clean rows, then noisy blocks until the bin is full. Rows with longer answers get more blocks."""
        for index, row in enumerate(rows):
            self.add_clean(row, index)
        lengths = [sum(end - first for first, end in row.answers) for row in rows]
        for block in itertools.count(1):
            sizes = [width for width in BLOCK_SIZES if width <= size - len(self.ids)]
            if not sizes:
                break
            width = rng.choices(sizes, [BLOCK_SIZES[width] for width in sizes])[0]
            index = rng.choices(range(len(rows)), lengths)[0]
            self.add_noisy(rows[index], index, block, width, rng, stage)
        self.pad(size)

    def pad(self, size: int) -> None:
        missing = size - len(self.ids)
        self.ids += [END] * missing
        self.positions += [0] * missing
        self.rows += [-1] * missing
        self.blocks += [0] * missing
        self.limits += [1] * missing
        self.targets += [END] * missing
        self.weights += [0.0] * missing


@dataclass
class Batch:
    ids: Tensor
    positions: Tensor
    visible: Tensor
    places: Tensor  # indices into the flattened batch: tokens with a loss
    targets: Tensor
    weights: Tensor  # normalised: the dot product with the token losses is the batch's loss


def visibility(rows: Tensor, positions: Tensor, blocks: Tensor, limits: Tensor) -> Tensor:
    """[batch, query, key] bool: clean keys before the query's limit, and the query's own block."""
    same_row = rows[:, :, None] == rows[:, None, :]
    clean_before = (blocks == 0)[:, None, :] & (positions[:, None, :] < limits[:, :, None])
    own_block = (blocks[:, :, None] == blocks[:, None, :]) & (blocks > 0)[:, :, None]
    return same_row & (clean_before | own_block)


def collate(bins: list[Bin]) -> Batch:
    def column(name: str, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor([getattr(packed, name) for packed in bins], dtype=dtype)

    ids, positions, weights = column("ids"), column("positions"), column("weights", torch.float).flatten()
    visible = visibility(column("rows"), positions, column("blocks"), column("limits"))
    clean, noisy = weights.clamp(min=0), (-weights).clamp(min=0)
    weights = clean / clean.sum().clamp(min=1) + noisy / noisy.sum().clamp(min=1)
    places = weights.nonzero()[:, 0]
    return Batch(ids, positions, visible, places, column("targets").flatten()[places], weights[places])


class Batches:
    """An endless stream of batches. Rows too long for an ordinary bin are collected for a batch of long bins."""

    def __init__(self, seed: int, encode: Callable[[str], list[int]], stage: Stage) -> None:
        self.rng = random.Random(f"blocks {seed}")
        self.corpus = Corpus(seed, held_out=False, shares=stage.shares, several=stage.several)
        self.encode = encode
        self.stage = stage

    def __iter__(self) -> Iterator[Batch]:
        ordinary: list[Bin] = []
        long: list[Bin] = []
        for rows, size in self.groups():
            bins = long if size == LONG_BIN else ordinary
            packed = Bin()
            packed.fill(rows, size, self.rng, self.stage)
            bins.append(packed)
            if len(bins) * size >= BATCH_TOKENS:
                yield collate(bins)
                bins.clear()

    def groups(self) -> Iterator[tuple[list[Row], int]]:
        """Rows that share a bin: as many as fit beside the noisy share."""
        waiting: dict[int, list[Row]] = {BIN: [], LONG_BIN: []}
        for conversation in self.corpus:
            row = tokenise(conversation, self.encode)
            if len(row.ids) > LONG_BIN * 0.8:
                continue
            size = BIN if len(row.ids) <= BIN * (1 - NOISY_SHARE) else LONG_BIN
            group = waiting[size]
            if group and sum(len(member.ids) for member in group) + len(row.ids) > size * (1 - NOISY_SHARE):
                yield list(group), size
                group.clear()
            group.append(row)


# --- optimiser


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate the nearest (semi-)orthogonal matrices [count, out, in] by five Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum with an orthogonalised update (Jordan et al., 2024). Matrices of one shape are updated as one batch."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        by_shape = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]
        self.rate, self.momentum, self.decay = rate, momentum, decay

    @torch.no_grad()
    def step(self, factor: float) -> None:
        rate = self.rate * factor
        for parameters, velocity in self.groups:
            gradient = torch.stack([parameter.grad for parameter in parameters])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp_(velocity, self.momentum).to(PRODUCTS)).float()
            scale = max(1, update.shape[1] / update.shape[2]) ** 0.5
            for parameter, change in zip(parameters, update, strict=True):
                parameter.mul_(1 - rate * self.decay).add_(change, alpha=-rate * scale)


def schedule(step: int, steps: int) -> float:
    """Warm-up, plateau, then a linear descent over the last 60 % of the run."""
    return min(1.0, (step + 1) / 60, (steps - step) / (0.6 * steps))


# --- training


def make_config() -> NemotronLabsDiffusionConfig:
    return NemotronLabsDiffusionConfig(
        architectures=["NemotronLabsDiffusionModel"],
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        hidden_act="silu",
        block_size=32,
        bos_token_id=SPECIAL_IDS["<s>"],
        eos_token_id=END,
        mask_token_id=MASK,
        dlm_paradigm="bidirectional",
        head_dim=64,
        hidden_size=256,
        intermediate_size=384,
        num_attention_heads=4,
        num_hidden_layers=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=VOCABULARY,
        use_cache=False,
        initializer_range=0.02,
        dtype="bfloat16",
    )


def make_model(seed: int) -> NemotronLabsDiffusionModel:
    """The reference network in fp32 with scaled normal weights; ``o_proj`` and ``down_proj`` start at zero."""
    torch.manual_seed(seed)
    model = NemotronLabsDiffusionModel(make_config()).float()
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)
    return model


def loss_of(encoder: Callable[..., tuple[Tensor, object]], head: nn.Module, batch: Batch) -> Tensor:
    """Sum of both streams' mean losses. The head computes only the rows that have a loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=PRODUCTS is torch.bfloat16):
        hidden, _ = encoder(batch.ids, batch.positions, batch.visible)
        logits = head(hidden.flatten(0, 1)[batch.places])
    likelihoods = logits.float().log_softmax(-1)
    own = F.nll_loss(likelihoods, batch.targets, ignore_index=FAR, reduction="none")
    far = batch.targets == FAR
    frequencies = torch.bincount(batch.targets[~far], minlength=VOCABULARY) / (~far).sum()
    losses = torch.where(far, -(likelihoods @ frequencies), own)
    return losses @ batch.weights


@torch.no_grad()
def teacher_forced(model: NemotronLabsDiffusionModel, rows: list[Row]) -> dict[str, float]:
    """AR exact match by kind, from one causal pass a row: greedy decoding emits the answer if and only if every next
    token is the argmax given the true text.
    """
    right, count = Counter(), Counter()
    for chunk in (rows[at : at + 16] for at in range(0, len(rows), 16)):
        longest = max(len(row.ids) for row in chunk)
        ids = torch.tensor([row.ids + [END] * (longest - len(row.ids)) for row in chunk])
        best = model(ids).logits.argmax(-1)
        for row, guess in zip(chunk, best, strict=True):
            first, end = row.answers[-1]
            right[row.kind] += guess[first - 1 : end - 1].tolist() == row.ids[first:end]
            count[row.kind] += 1
    return {kind: right[kind] / count[kind] for kind in count} | {"all": right.total() / count.total()}


def train_network(
    model: NemotronLabsDiffusionModel, batches: Iterable[Batch], stage: Stage, report: Callable[[int], None]
) -> None:
    matrices = [parameter for name, parameter in model.named_parameters() if "_proj" in name]
    others = [parameter for name, parameter in model.named_parameters() if "_proj" not in name]
    muon = Muon(matrices, rate=0.012)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    torch._dynamo.config.automatic_dynamic_shapes = False  # compile each of the two bin sizes separately
    encoder = torch.compile(model.encoder) if stage.steps > 20 else model.encoder
    running, began, steps = 0.0, time.monotonic(), stage.steps
    for step, batch in enumerate(itertools.islice(batches, steps)):
        loss = loss_of(encoder, model.diffusion_head, batch)
        loss.backward()
        factor = stage.peak * schedule(step, steps)
        muon.step(factor)
        for group in adam.param_groups:
            group["lr"] = 3e-3 * factor
        adam.step()
        model.zero_grad(set_to_none=True)
        running += 0.05 * (loss.item() - running) if step else loss.item()
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - began) / (step + 1)
            progress(
                f"step {step + 1}/{steps}  loss {running:.3f}  {seconds:.3f} s a step  "
                f"{(steps - step - 1) * seconds / 60:.1f} min left"
            )
        report(step + 1)


def run_stage(
    model: NemotronLabsDiffusionModel, stage: Stage, batches: Iterable[Batch], held_out: list[Row], every: int
) -> NemotronLabsDiffusionModel:
    """Train and report scores by kind every ``every`` steps; returns the network with bfloat16 values."""

    def report(step: int) -> None:
        if step % every == 0 or step == stage.steps:
            scores = teacher_forced(rounded(model), held_out)
            progress(f"AR exact match at step {step}: " + "  ".join(f"{k} {v:.2f}" for k, v in sorted(scores.items())))

    train_network(model, batches, stage, report)
    return rounded(model)


# --- draft adapter


def adapter_batch(rows: list[Row], rng: random.Random) -> tuple[Batch, int]:
    """A batch with one row per bin, then three entirely masked blocks; and the start of the noisy stream."""
    clean_size = max(len(row.ids) for row in rows)
    bins = []
    for row in rows:
        packed = Bin()
        packed.add_clean(row, 0)
        packed.weights = [0.0] * len(row.ids)
        packed.pad(clean_size)
        for block in range(1, 4):
            packed.add_noisy(row, 0, block, rng.choice((16, 32)), rng, ONE_SHOT)
        packed.pad(clean_size + 96)
        bins.append(packed)
    return collate(bins), clean_size


def train_adapter(base: NemotronLabsDiffusionModel, rows: Iterator[Row], steps: int, seed: int) -> PeftModel:
    """Train a LoRA on ``o_proj`` that improves one-pass drafts; the base is frozen.

    The clean stream runs first, without the adapter. Its keys and values are the cache of the drafts, as in decoding.
    """
    rng = random.Random(f"adapter {seed}")
    torch.manual_seed(seed)
    settings = LoraConfig(r=ADAPTER_RANK, lora_alpha=4 * ADAPTER_RANK, target_modules=["o_proj"], bias="none")
    adapted = get_peft_model(base, settings)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    running = 0.0
    for step in range(steps):
        batch, start = adapter_batch(list(itertools.islice(rows, 16)), rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=PRODUCTS is torch.bfloat16):
            with torch.no_grad(), base.draft_adapter(False):
                visible = batch.visible[:, :start, :start]
                _, past = base.encoder(batch.ids[:, :start], batch.positions[:, :start], visible)
            hidden, _ = base.encoder(batch.ids[:, start:], batch.positions[:, start:], batch.visible[:, start:], past)
            everything = torch.cat((hidden.new_zeros(len(hidden), start, hidden.shape[2]), hidden), dim=1)
            logits = base.diffusion_head(everything.flatten(0, 1)[batch.places])
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="none") @ batch.weights
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = 2e-3 * schedule(step, steps)
        adam.step()
        running += 0.02 * (loss.item() - running) if step else loss.item()
        if (step + 1) % 100 == 0:
            progress(f"adapter step {step + 1}/{steps}  loss {running:.3f}")
    return adapted


# --- files


def rounded(model: NemotronLabsDiffusionModel) -> NemotronLabsDiffusionModel:
    """A copy with bfloat16 values that computes in fp32: the shipped values are evaluated and adapted."""
    copy = NemotronLabsDiffusionModel(make_config()).float()
    copy.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    return copy.eval()


def export(
    out: Path,
    model: NemotronLabsDiffusionModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterator[Row],
    adapter_steps: int,
    seed: int,
) -> None:
    """Write the checkpoint folder: tokenizer, weights, adapter, settings. model: its weights have bfloat16 values."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    known_everywhere = {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers 4 does not know 5's name
    settings.write_text(json.dumps(json.loads(settings.read_text()) | known_everywhere, indent=2) + "\n")
    shipped = NemotronLabsDiffusionModel(make_config()).bfloat16()
    shipped.load_state_dict(model.state_dict())
    shipped.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    generation = GenerationConfig(
        bos_token_id=SPECIAL_IDS["<s>"], eos_token_id=END, pad_token_id=END, max_new_tokens=256
    )
    generation.save_pretrained(out)
    adapted = train_adapter(model, rows, adapter_steps, seed)
    folder = out / "linear_spec_lora"
    shutil.rmtree(folder, ignore_errors=True)
    adapted.bfloat16().save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # an empty card by peft
    progress(f"wrote {out}")


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps of stage 1; the others shrink in proportion")
    parser.add_argument("--adapter-steps", type=int, default=ONE_SHOT.steps)
    parser.add_argument("--report-every", type=int, default=500, help="steps between measurements on held-out problems")
    parser.add_argument("--held-out", type=Path, help="also write the evaluation's prompts to this file")
    arguments = parser.parse_args()
    seed = arguments.seed

    keep_freed_memory()
    torch.set_num_threads(2)
    tokenizer = train_tokenizer(itertools.islice(Corpus(seed, held_out=False), 20000))
    check_template(tokenizer, itertools.islice(Corpus(seed, held_out=False), 200))
    encode = encoder_of(tokenizer)
    held_out = [tokenise(row, encode) for row in itertools.islice(Corpus(seed + 1, True, REVISED_SHARES), 480)]
    if arguments.held_out:
        write_jsonl(arguments.held_out, held_out_records(seed))
    model = make_model(seed)
    count = sum(parameter.numel() for parameter in model.parameters())
    answers = [end - first for row in held_out for first, end in row.answers]
    progress(
        f"{count:,} parameters; rows of {sum(len(row.ids) for row in held_out) / len(held_out):.0f} tokens, "
        f"answers of {sum(answers) / len(answers):.0f}"
    )

    for index, stage in enumerate(STAGES):
        if arguments.steps:
            stage = replace(stage, steps=max(1, stage.steps * arguments.steps // STAGES[0].steps))
        batches = Batches(seed + 100 * index, encode, stage)
        model = run_stage(model, stage, batches, held_out, arguments.report_every)

    def rows_for_adapter() -> Iterator[Row]:
        for conversation in Corpus(seed + 2, False, ONE_SHOT.shares):
            row = tokenise(conversation, encode)
            if len(row.ids) <= BIN:
                yield row

    export(arguments.out, model, tokenizer, rows_for_adapter(), arguments.adapter_steps, seed)
    calibration = itertools.islice(Corpus(seed + 3, False, REVISED_SHARES), 64)
    write_jsonl(arguments.out / "calibration.jsonl", ({"messages": row.messages()} for row in calibration))


if __name__ == "__main__":
    main()
