"""The options of GPU targets (window or view of the KV pool, rows selected by a product) do not change the results: the
logits and the rows written to the pool are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from tests.support.token_masks import best_legal, packed, random_legal
from trimode.build.graph.network import KvRead, NetworkOptions, build_network
from trimode.build.graph.raw_pool import RawPool, write_raw_pool
from trimode.build.rtx.graph_form import tensorrt_form
from trimode.common.progress import no_progress
from trimode.model.checkpoint import Checkpoint
from trimode.model.step import AttentionPattern, cache_inputs, cache_outputs, cache_views

CAPACITY, COMMITTED, WINDOW, STEP, BATCH = 256, (40, 93), 128, 12, 2
ON_GPU = NetworkOptions(
    top_k=768, adapter=True, capacity=CAPACITY, kv_read="view", rotate_together=True, select_by_product=True
)
PATTERNS = pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
Arrays = dict[str, NDArray[np.generic]]


@pytest.fixture(scope="module")
def checkpoint(random_int4_checkpoint: Path) -> Checkpoint:
    return Checkpoint(random_int4_checkpoint)


@pytest.fixture(scope="module")
def pool(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> RawPool:
    path = tmp_path_factory.mktemp("pool") / "raw.bin"
    return write_raw_pool(checkpoint, path, no_progress, np.dtype(np.float32))


def inputs_of(checkpoint: Checkpoint) -> Arrays:
    """A step for two sequences over a pool of random rows. Rows after the committed ones are random too."""
    rng, config = np.random.default_rng(0), checkpoint.config
    write = np.array(COMMITTED)
    feeds: Arrays = {
        "input_ids": rng.integers(101, 768, (BATCH, STEP)),
        "position_ids": write[:, None] + np.arange(STEP),
        "write_indices": write,
        "logit_rows": np.array([[2, 0, 11, 5], [1, 4, 4, 6]]),
        "block_mask": np.tril(rng.random((BATCH, STEP, STEP)) < 0.7) | np.eye(STEP, dtype=bool),
        "step_lengths": np.array([STEP, STEP - 5]),
        "adapter_scale": np.array([1, 0], np.float32),
        "window_rows": np.arange(WINDOW),
        "token_mask": np.empty((BATCH, 0, config.vocab_size // 8), np.uint8),
        "asked_ids": rng.integers(0, config.vocab_size, (BATCH, 4, 3)),
    }
    cache = (BATCH, config.num_key_value_heads, CAPACITY, config.head_dim)
    for name in cache_inputs(config.num_hidden_layers):
        feeds[name] = rng.standard_normal(cache, np.float32)
    for index in range(config.num_hidden_layers):
        feeds[f"adapter_down.{index}"] = rng.standard_normal((config.query_width, 8), np.float32) * np.float32(0.1)
        feeds[f"adapter_up.{index}"] = rng.standard_normal((8, config.hidden_size), np.float32) * np.float32(0.1)
    return feeds


def graph_of(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions
) -> onnx.ModelProto:
    graph = build_network(checkpoint.config, pool, pattern, options)
    onnx.save(graph, source := pool.path.with_name("checked.onnx"))
    onnx.checker.check_model(source, full_check=True)
    return graph


def execute(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, options: NetworkOptions
) -> dict[str, NDArray[np.generic]]:
    """One pass in ONNX Runtime, each cache, its output and its view one buffer."""
    layers = checkpoint.config.num_hidden_layers
    onnx.save(graph_of(checkpoint, pool, pattern, options), source := pool.path.with_name(f"{pattern}.onnx"))
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # fp32: no rounding hides a fault
    session = ort.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs_of(checkpoint).items()}
    for aliases in (cache_views(layers), cache_outputs(layers)):
        values |= {alias: values[name] for alias, name in zip(aliases, cache_inputs(layers), strict=True)}
    binding = session.io_binding()
    for wanted in session.get_inputs():
        binding.bind_ortvalue_input(wanted.name, values[wanted.name])
    names = [made.name for made in session.get_outputs()]
    for name in names:
        if name in values:
            binding.bind_ortvalue_output(name, values[name])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if not name.startswith("top_"):
            np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(found["top_tokens"][..., 0], expected["top_tokens"][..., 0])


@PATTERNS
@pytest.mark.parametrize("kv_read", ["cache", "window", "view"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_form_computes_the_same(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern, kv_read: KvRead, on_gpu: bool
) -> None:
    plain = execute(checkpoint, pool, pattern, NetworkOptions(top_k=768, adapter=True))
    form = NetworkOptions(
        top_k=768, adapter=True, capacity=CAPACITY, kv_read=kv_read, rotate_together=on_gpu, select_by_product=on_gpu
    )
    assert_same(execute(checkpoint, pool, pattern, form), plain)


def test_a_window_that_ends_too_early_is_detected(
    checkpoint: Checkpoint, pool: RawPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: rows after the window are not attended to."""
    monkeypatch.setattr(f"{__name__}.WINDOW", 64)
    plain = execute(checkpoint, pool, "causal", NetworkOptions(top_k=4, adapter=False))
    form = NetworkOptions(top_k=4, adapter=False, capacity=CAPACITY, kv_read="window")
    differing = np.abs(execute(checkpoint, pool, "causal", form)["log_sum_exp"] - plain["log_sum_exp"])
    assert differing[0].max() < 1e-3 < differing[1].max()


@PATTERNS
def test_a_pass_leaves_committed_rows_as_they_were(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern
) -> None:
    before, after = inputs_of(checkpoint), execute(checkpoint, pool, pattern, ON_GPU)
    layers = checkpoint.config.num_hidden_layers
    for name, updated in zip(cache_inputs(layers), cache_outputs(layers), strict=True):
        for sequence, committed in enumerate(COMMITTED):
            untouched = np.r_[0:committed, committed + STEP : CAPACITY]
            old, new = before[name][sequence], after[updated][sequence]
            np.testing.assert_array_equal(new[:, untouched], old[:, untouched])
            assert (new[:, committed : committed + STEP] != old[:, committed : committed + STEP]).mean() > 0.99


@PATTERNS
def test_attention_depends_on_the_writes_of_its_caches(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern
) -> None:
    """Only the edges of the graph define the order for an executor."""
    graph = graph_of(checkpoint, pool, pattern, ON_GPU).graph
    makers = {result: node for node in graph.node for result in node.output}
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == checkpoint.config.num_hidden_layers
    for index, attention in enumerate(attentions):
        assert list(attention.input[1:3]) == [f"k_view.{index}", f"v_view.{index}"]
        needed, waiting = set(), [attention]
        while waiting:
            for name in waiting.pop().input:
                if name in makers and name not in needed:
                    needed.add(name)
                    waiting.append(makers[name])
        assert {f"k_cache_out.{index}", f"v_cache_out.{index}"} <= needed


@PATTERNS
def test_the_graph_form_for_tensorrt_computes_the_same(
    checkpoint: Checkpoint, pool: RawPool, pattern: AttentionPattern
) -> None:
    """Keys as columns and an unexpanded mask, in ONNX's reference evaluator: ONNX Runtime rejects such a mask. A view
    of columns is not an alias here, so it contains the rows that the pass writes.
    """
    layers = checkpoint.config.num_hidden_layers
    feeds = inputs_of(checkpoint)
    expected = refer(graph_of(checkpoint, pool, pattern, NetworkOptions(top_k=768, adapter=True)), pool, feeds)
    for view, updated in zip(cache_views(layers), cache_outputs(layers), strict=True):
        rows = expected[updated]
        heads = rows.reshape(-1, *rows.shape[2:])
        feeds[view] = rows if view.startswith("v") else heads.transpose(0, 2, 1)[..., None]
    graph = tensorrt_form(graph_of(checkpoint, pool, pattern, ON_GPU), layers)
    assert_same(refer(graph, pool, feeds), expected)
    spread = [node for node in graph.graph.node if node.op_type == "Expand"]
    assert len(spread) == (pattern == "causal")  # a bidirectional mask is not expanded


class GatherElements(OpRun):  # type: ignore[misc]
    """The evaluator's own takes at most 64 columns."""

    op_domain = ""

    def _run(self, data: NDArray[np.generic], indices: NDArray[np.int64], axis: int = 0) -> tuple[NDArray[np.generic]]:
        return (np.take_along_axis(data, indices, axis),)


def refer(graph: onnx.ModelProto, pool: RawPool, feeds: Arrays) -> Arrays:
    """One pass in ONNX's reference evaluator."""
    onnx.save(graph, source := pool.path.with_name("referred.onnx"))
    reference = ReferenceEvaluator(str(source), new_ops=[GatherElements])
    results = reference.run(None, {name: feeds[name] for name in reference.input_names})
    return dict(zip(reference.output_names, results, strict=True))


def test_16_bit_logits_have_the_order_of_fp32_ones_and_omit_the_mask_token(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """In fp16, TopK includes the mask token, which is then dropped. Here it is the best token of some rows. So do rows
    with a token mask.
    """
    pool = write_raw_pool(checkpoint, tmp_path / "raw.bin", no_progress, np.dtype(np.float16))
    options = NetworkOptions(top_k=5, adapter=False, activations="fp16", masks="apart")
    feeds = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in inputs_of(checkpoint).items()
    }
    legal = random_legal(np.random.default_rng(5), BATCH, 4, checkpoint.config.vocab_size)
    feeds["token_mask"] = packed(legal).view(np.uint8)

    def run(mask_token: int) -> tuple[NDArray[np.float32], Arrays]:
        config = checkpoint.config.model_copy(update={"mask_token_id": mask_token})
        graph = build_network(config, pool, "causal", options)
        logits = next(
            node for node in graph.graph.node if node.op_type == "GatherElements" and "asked_ids" in node.input
        ).input[0]
        graph.graph.output.append(onnx.helper.make_tensor_value_info(logits, onnx.TensorProto.FLOAT16, None))
        found = refer(graph, pool, feeds)
        return found.pop(logits).astype(np.float32), found

    logits, _ = run(checkpoint.config.mask_token_id)
    mask_token = int(logits[1, 1].argmax())
    found_logits, found = run(mask_token)
    logits = found_logits.copy()
    logits[..., mask_token] = -np.inf
    best = np.argsort(-logits, axis=-1, kind="stable")[..., :5]
    np.testing.assert_array_equal(found["top_tokens"], best)
    np.testing.assert_array_equal(found["top_logits"], np.take_along_axis(logits, best, -1))
    np.testing.assert_allclose(found["log_sum_exp"], np.log(np.exp(logits).sum(-1)), rtol=1e-5)
    masked = best_legal(found_logits, legal, mask_token, 5)
    np.testing.assert_array_equal(found["masked_top_tokens"], masked.tokens)
    np.testing.assert_array_equal(found["masked_top_logits"], masked.logits)
    np.testing.assert_allclose(found["masked_log_sum_exp"], masked.log_sum_exp, rtol=1e-5)
    asked = np.take_along_axis(found_logits, feeds["asked_ids"], -1)
    np.testing.assert_array_equal(found["asked_logits"], asked)


@PATTERNS
@pytest.mark.parametrize("masks", ["branch", "apart"])
def test_rows_with_a_token_mask_have_the_best_legal_tokens(
    checkpoint: Checkpoint,
    pool: RawPool,
    pattern: AttentionPattern,
    masks: Literal["branch", "apart"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both forms, from the logits of the same pass without a mask. The form with results apart has those as well."""
    options = NetworkOptions(top_k=768, adapter=True, masks=masks)
    inputs, prefix = inputs_of(checkpoint), "" if masks == "branch" else "masked_"
    unmasked = execute(checkpoint, pool, pattern, options)
    logits = np.empty_like(unmasked["top_logits"])
    np.put_along_axis(logits, unmasked["top_tokens"], unmasked["top_logits"], axis=-1)
    legal = random_legal(np.random.default_rng(6), BATCH, 4, 768)
    mask = {"token_mask": packed(legal).view(np.uint8)}
    monkeypatch.setattr(f"{__name__}.inputs_of", lambda _checkpoint: inputs | mask)
    found = execute(checkpoint, pool, pattern, options)
    expected = best_legal(logits, legal, checkpoint.config.mask_token_id, 768)
    np.testing.assert_array_equal(found[f"{prefix}top_tokens"], expected.tokens)
    np.testing.assert_array_equal(found[f"{prefix}top_logits"], expected.logits)
    np.testing.assert_allclose(found[f"{prefix}log_sum_exp"], expected.log_sum_exp, rtol=1e-5)
    if masks == "apart":
        assert all(np.array_equal(found[name], unmasked[name]) for name in ("top_tokens", "top_logits", "log_sum_exp"))
        assert all(unmasked[f"masked_{name}"].size == 0 for name in ("top_tokens", "top_logits", "log_sum_exp"))
