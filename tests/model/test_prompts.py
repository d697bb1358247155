"""Prompt texts and ids equal transformers', for tokenizers and templates like those of published checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimode.common.errors import TriModeError
from trimode.model.tokenizer import Tokenizer, tokenizer_files

Change = Callable[[Path], object]

QUESTION = [{"role": "user", "content": "What is 60% of 440?"}]
TURNS = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Hi \n there  <|im_start|> <s>"},
    {"role": "assistant", "content": "<think>\nno</think>Hello, Jörg 🙂"},
    {"role": "user", "content": "日本 <b>'Bye'</b>"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers, größer & kleiner",
        "parameters": {"type": "object", "properties": {"b": {"type": "number"}, "a": {"type": "number"}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 1}}}
TOOL_TURNS = [
    {"role": "user", "content": "1 + 2?", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": '{"sum": 3}'},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
REASONED = [*QUESTION, {"role": "assistant", "content": "264", "reasoning": "0.6 * 440"}, *QUESTION]
TEXTS = [
    "",
    "Hello",
    " a  b\n\nc ",
    "<s>Hello</s> <think>x</think>",
    "日本 🙂 é",
    "<|im_start|>user\nHi<|im_end|>",
    "<new> x<new>y",
]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content))

    return apply


def config(**fields: Any) -> Change:
    return edit("tokenizer_config.json", lambda content: content.update(fields))


def tokenizer(**fields: Any) -> Change:
    return edit("tokenizer.json", lambda content: content.update(fields))


def write(name: str, text: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return apply


def remove(*names: str) -> Change:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def without(name: str, *keys: str) -> Change:
    return edit(name, lambda content: [content.pop(key, None) for key in keys])


def added(content: str, index: int, **flags: bool) -> Change:
    token = {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    entry = token | {"normalized": False, "special": True} | flags
    return edit("tokenizer.json", lambda file: file["added_tokens"].append(entry))


def flags(content: str, **changes: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content} | plain | changes


def adds_bos() -> dict[str, Any]:
    """A post-processor that writes BOS before plain text."""
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


PADDING = {
    "strategy": {"Fixed": 32},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 11,
    "pad_type_id": 0,
    "pad_token": "<|im_end|>",
}
TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentencepiece(folder: Path) -> None:
    """As converted from SentencePiece's BPE: a prefix space by a normalizer, bytes for unknown characters."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", *"Helo abcW", "He", "ll", "▁He", "▁Hell"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("H", "e"), ("l", "l"), ("▁", "He"), ("▁He", "ll")]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.save(str(folder / "tokenizer.json"))


def unigram(folder: Path) -> None:
    """As converted from SentencePiece's Unigram, with a Metaspace pre-tokenizer and an NFKC normalizer."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁Hello", -1.0)]
    pieces += [(letter, -4.0) for letter in "Helo abcdeinrstuW<>|_/?%0123456789"]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.save(str(folder / "tokenizer.json"))


TOKENIZERS: dict[str, Change] = {
    "as shipped": both(),
    "truncation is stored": tokenizer(truncation=TRUNCATION),
    "padding is stored": tokenizer(padding=PADDING),
    "padding names the only pad token": both(
        tokenizer(padding=PADDING),
        without("tokenizer_config.json", "pad_token"),
        write("chat_template.jinja", CHATML + "{{ pad_token }}"),
    ),
    "BOS before plain text": tokenizer(post_processor=adds_bos()),
    "BOS by the template and before plain text": both(
        tokenizer(post_processor=adds_bos()), write("chat_template.jinja", "{{ bos_token }}" + CHATML)
    ),
    "no post-processor, add_bos_token": both(tokenizer(post_processor=None), config(add_bos_token=True)),
    "post-processor, add_bos_token false": both(tokenizer(post_processor=adds_bos()), config(add_bos_token=False)),
    "add_eos_token": config(add_eos_token=True),
    "no tokenizer_config.json": remove("tokenizer_config.json"),
    "tokens with flags in the config": config(bos_token=flags("<s>") | {"__type": "AddedToken"}, eos_token="</s>"),
    "special_tokens_map.json names BOS": both(
        without("tokenizer_config.json", "bos_token", "eos_token"),
        write("special_tokens_map.json", json.dumps({"bos_token": "</s>", "eos_token": flags("<|im_end|>")})),
        write("chat_template.jinja", "{{ bos_token }}" + CHATML),
    ),
    "special_tokens_map.json overrides": both(
        write("special_tokens_map.json", json.dumps({"bos_token": "</s>", "pad_token": None})),
        write("chat_template.jinja", "{{ bos_token }}{{ pad_token is defined }}" + CHATML),
    ),
    "added_tokens_decoder wins over special_tokens_map.json": both(
        config(added_tokens_decoder={"1": flags("<s>")}),
        write("special_tokens_map.json", json.dumps({"bos_token": "</s>"})),
        write("chat_template.jinja", "{{ bos_token }}" + CHATML),
    ),
    "added_tokens_decoder changes flags": config(
        added_tokens_decoder={"12": flags("<think>", special=True, lstrip=True), "1": flags("<s>", rstrip=True)}
    ),
    "added_tokens_decoder adds": config(added_tokens_decoder={"768": flags("<new>", special=False, normalized=True)}),
    "added_tokens.json": write("added_tokens.json", json.dumps({"<new>": 768, "<think>": 12})),
    "a pad token that is new": config(pad_token="<new>"),
    "extra special tokens": config(extra_special_tokens=["<new>", "<think>"]),
    "named extra special tokens": both(
        config(extra_special_tokens={"image_token": "<new>"}, audio_token="<think>"),
        write("chat_template.jinja", "{{ image_token }}{{ audio_token }}" + CHATML),
    ),
    "additional special tokens": config(
        additional_special_tokens=["<|im_start|>", flags("<new>") | {"__type": "AddedToken"}]
    ),
    "additional special tokens in special_tokens_map.json": write(
        "special_tokens_map.json", json.dumps({"additional_special_tokens": ["<|im_start|>", "<new>"]})
    ),
    "added token with lstrip": added("<new>", 768, lstrip=True),
    "added token with rstrip": added("<new>", 768, rstrip=True),
    "added token of a single word": added("<new>", 768, single_word=True, special=False),
    "added token that is normalized": both(
        tokenizer(normalizer={"type": "Lowercase"}), added("<NEW>", 768, special=False, normalized=True)
    ),
    "special tokens are split": config(split_special_tokens=True),
    "a prefix space": tokenizer(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "add_prefix_space in the config": config(add_prefix_space=True),
    "NFC": tokenizer(normalizer={"type": "NFC"}),
    "unigram": unigram,
    "sentencepiece": sentencepiece,
    "sentencepiece of class LlamaTokenizer": both(sentencepiece, config(tokenizer_class="LlamaTokenizer")),
    "sentencepiece, legacy": both(sentencepiece, config(tokenizer_class="LlamaTokenizerFast", legacy=True)),
    "sentencepiece, not legacy": both(sentencepiece, config(tokenizer_class="LlamaTokenizerFast", legacy=False)),
    "sentencepiece, no prefix space": both(
        sentencepiece, config(tokenizer_class="LlamaTokenizerFast", add_prefix_space=False)
    ),
    "sentencepiece, added_tokens_decoder": both(
        sentencepiece,
        config(
            tokenizer_class="LlamaTokenizerFast",
            added_tokens_decoder={"1": flags("<s>"), "2": flags("</s>", rstrip=True), "300": flags("<new>")},
        ),
    ),
    "sentencepiece, class in config.json": both(
        sentencepiece,
        without("tokenizer_config.json", "tokenizer_class", "bos_token", "eos_token", "unk_token"),
        edit("config.json", lambda content: content.update(tokenizer_class="LlamaTokenizer")),
        write("chat_template.jinja", "{{ bos_token }}" + CHATML + "{{ eos_token }}"),
    ),
    "sentencepiece without a config": both(sentencepiece, remove("tokenizer_config.json")),
    "model_max_length": config(model_max_length=8),
    "clean_up_tokenization_spaces": config(clean_up_tokenization_spaces=True),
    "class PreTrainedTokenizer": config(tokenizer_class="PreTrainedTokenizer"),
    "class LlamaTokenizerFast on bytes": config(tokenizer_class="LlamaTokenizerFast"),
    "class TokenizersBackend": config(tokenizer_class="TokenizersBackend"),
    "class unknown": config(tokenizer_class="SomebodysTokenizerFast"),
    "no class": without("tokenizer_config.json", "tokenizer_class"),
    "a template in the config": both(remove("chat_template.jinja"), config(chat_template=CHATML)),
    "a template file beside one in the config": config(chat_template="no"),
    "named templates in the config": both(
        remove("chat_template.jinja"),
        config(chat_template=[{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "T" + CHATML}]),
    ),
    "named templates as a mapping": both(
        remove("chat_template.jinja"), config(chat_template={"default": CHATML, "tool_use": "T" + CHATML})
    ),
    "named templates without a default": both(
        remove("chat_template.jinja"), config(chat_template=[{"name": "tool_use", "template": "T" + CHATML}])
    ),
    "additional templates": both(
        write("additional_chat_templates/tool_use.jinja", "T" + CHATML),
        write("additional_chat_templates/rag.jinja", "{{ documents }}" + CHATML),
    ),
    "additional templates alone": both(
        remove("chat_template.jinja"),
        config(chat_template=CHATML),
        write("additional_chat_templates/tool_use.jinja", "T" + CHATML),
    ),
    "a template with CRLF": write("chat_template.jinja", CHATML.replace("{%", "\r\n{%")),
    "a template with a byte order mark": write("chat_template.jinja", "\ufeff" + CHATML),
}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the shipped checkpoint's tokenizer and config."""
    for path in tokenizer_files(tiny_checkpoint):
        shutil.copyfile(tiny_checkpoint / path, tmp_path / path)
    return tmp_path


def theirs_or_none(theirs: PreTrainedTokenizerFast, messages: Any, **options: Any) -> tuple[str, list[int]] | None:
    """transformers' text and ids; None if it refuses."""
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, **options)
        return text, theirs.apply_chat_template(messages, return_dict=False, **options)
    except Exception:  # templates and transformers raise anything
        return None


def ours_or_none(ours: Tokenizer, messages: Any, **options: Any) -> tuple[str, list[int]] | None:
    try:
        text = ours.apply_chat_template(messages, **options)
    except TriModeError:
        return None
    return text, ours.encode(text)


def assert_same(ours: Tokenizer, theirs: PreTrainedTokenizerFast, messages: Any, **options: Any) -> None:
    """Equal, or refused by both. Where transformers fails on a message without content, its content is empty text."""
    options = {"add_generation_prompt": True} | options
    expected = theirs_or_none(theirs, messages, **options)
    if expected is None:
        expected = theirs_or_none(theirs, [each | {"content": each["content"] or ""} for each in messages], **options)
    assert ours_or_none(ours, messages, **options) == expected


@pytest.mark.parametrize("variant", TOKENIZERS)
def test_tokenizers(folder: Path, variant: str) -> None:
    TOKENIZERS[variant](folder)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=True) == theirs(text).input_ids, text
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    for messages in (QUESTION, TURNS):
        for tools in (None, [TOOL]):
            assert_same(ours, theirs, messages, tools=tools)
        assert_same(ours, theirs, messages, add_generation_prompt=False)


TEMPLATES: dict[str, str] = {
    "chatml": CHATML,
    "chatml with BOS": "{{ bos_token }}" + CHATML,
    "BOS inside the loop": "{% for m in messages %}{{ bos_token if loop.first }}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation is a scope": "{% set x = 'a' %}{%- generation -%}{% set x = 'b' %}{{ x }}{%- endgeneration -%}{{ x }}",
    "tools is none": "{% if tools is none %}none{% else %}{{ tools | length }}{% endif %}",
    "tools is defined": "{{ tools is defined }} {{ documents is defined }} {{ tools is not none }}",
    "tools by length": "{% if tools is not none and tools | length > 0 %}{{ tools | tojson }}{% endif %}",
    "tools without arguments": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}",
    "tojson indented": "{{ messages | tojson(indent=2) }}",
    "tojson in ASCII": "{{ messages | tojson(ensure_ascii=True) }}",
    "tojson sorted": "{{ tools | tojson(sort_keys=True, separators=(',', ':')) }}",
    "tojson by position": "{{ messages | tojson(True, 1) }}",
    "documents": "{% for d in documents or [] %}{{ d.title }}: {{ d['text'] }}\n{% endfor %}" + CHATML,
    "all special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ mask_token }}",
    "special tokens that are not set": "{{ sep_token is defined }}{{ cls_token | default('none') }}{{ sep_token }}",
    "raise_exception": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No\nsystem') }}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "alternate": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}",
    "system first": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = '' %}{% endif %}{% for m in loop_messages %}"
    "{{ (system_message if loop.first else '') ~ m['content'].strip() ~ ' ' ~ eos_token }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
    "{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(last=0, tool=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}{{ ns.tool }}",
    "namespace of a mapping": "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a + ns.b }}",
    "namespace with a private name": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "namespace gains a private name": "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "macro": "{% macro turn(m, end='\\n') %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "macro with caller": "{% macro tag(name) %}<{{ name }}>{{ caller() }}</{{ name }}>{% endmacro %}"
    "{% call tag('x') %}{{ messages[0].content }}{% endcall %}",
    "previtem and nextitem": "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '^' }}"
    "{{ m.role }}{{ loop.nextitem.role if not loop.last else '$' }};{% endfor %}",
    "loop.changed and cycle": "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "dictsort and items": "{% for k, v in messages[0] | dictsort %}{{ k }}={{ v }};{% endfor %}"
    "{% for k, v in messages[0].items() %}{{ k }};{% endfor %}",
    "selectattr": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}"
    "{{ messages | rejectattr('role', 'eq', 'user') | list | length }}",
    "groupby": "{% for role, turns in messages | groupby('role') %}{{ role }}{{ turns | length }}{% endfor %}",
    "default": "{{ enable_thinking | default(true) }}{{ custom | default('x', true) }}{{ custom is defined }}",
    "undefined prints nothing": "[{{ nothing }}][{{ messages[0].nothing }}]",
    "undefined has no attributes": "{{ messages[0].nothing.more }}",
    "undefined is not added": "{{ 'a' + messages[0].nothing }}",
    "thinking": "{{ '<think>\n' if enable_thinking is defined and enable_thinking else '<think></think>' }}",
    "content by parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}",
    "is mapping, iterable, sequence": "{% for m in messages %}{{ m is mapping }}{{ m.content is iterable }}"
    "{{ m.content is sequence }}{{ m.content is none }}{{ m.content is defined }}{{ 'content' in m }}{% endfor %}",
    "tool calls": "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}<call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</call>{% endfor %}"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "keys that are null": "{% for m in messages %}{{ m.keys() | list }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content is defined }}{{ m.thinking }}{{ m.reasoning }}"
    "{% endfor %}",
    "strings": "{% for m in messages %}{% if m.content is string %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n').upper() }}{{ m.content.startswith('H') }}{{ m.content[:3] }}"
    "{{ m.content | replace('a', 'b') | length }}{% endif %}{% endfor %}",
    "comments and whitespace": "{#- none -#}\n  {%- for m in messages -%}\n    {{- m.role }}  \n  {%- endfor %}\n\n",
    "lstrip and trim blocks": "  {% if true %}\n  x\n  {% endif %}\ny\n",
    "strftime": "{{ strftime_now('%Y') }}",
    "date by default": "{% if not date is defined %}{% set date = '26 Jul 2024' %}{% endif %}{{ date }}",
    "concatenation": "{% for m in messages %}{{ m.role ~ ':' ~ loop.index }}{{ '%s' | format(m.role) }}{% endfor %}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 1 / 0 }}",
    "set block": "{% set text %}{{ messages[0].role }}!{% endset %}{{ text | upper }}{{ text | length }}",
    "filter block": "{% filter upper %}{{ messages[0].role }}{% endfilter %}",
    "inline if": "{{ 'a' if messages | length > 1 }}{{ messages[-1]['role'] }}",
    "dict and list": "{% set d = dict(a=1, **{'b': 2}) %}{{ d | tojson }}{% set l = [1] + [2] %}{{ l }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "getattr of a dict": "{{ messages[0].get('content', '') }}{{ messages[0].get('x', 'y') }}",
    "unicode escapes": "{{ '\\u00e9' }}{{ messages | map(attribute='content') | list | string }}",
    "include": "{% include 'x' %}",
    "escapes": "{{ '<&>' | e }}{{ '<&>' | safe }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "add_generation_prompt": "{{ add_generation_prompt }}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
}
CONVERSATIONS = {"question": QUESTION, "turns": TURNS, "tools": TOOL_TURNS, "parts": PARTS, "reasoned": REASONED}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no generation prompt": {"add_generation_prompt": False},
    "tools": {"tools": [TOOL]},
    "no tools": {"tools": []},
    "documents": {"documents": [{"title": "A", "text": "grün"}]},
    "thinking": {"enable_thinking": True},
    "not thinking": {"enable_thinking": False},
}


def with_template(folder: Path, template: str) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    write("chat_template.jinja", template)(folder)
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(folder: Path, template: str) -> None:
    ours, theirs = with_template(folder, TEMPLATES[template])
    for messages in CONVERSATIONS.values():
        for options in OPTIONS.values():
            assert_same(ours, theirs, messages, **options)


def test_template_variables(folder: Path) -> None:
    """They are variables of the template, and take precedence over special tokens."""
    ours, theirs = with_template(folder, "{{ bos_token }}{{ custom | tojson }}{{ custom.a[0] }}" + CHATML)
    variables = {"custom": {"a": [1, None, "x"]}, "bos_token": "B"}
    expected = theirs.apply_chat_template(QUESTION, tokenize=False, **variables)
    found = ours.apply_chat_template(QUESTION, add_generation_prompt=False, chat_template_kwargs=variables)
    assert found == expected
    assert found.startswith("B")


def test_template_by_name_and_by_text(folder: Path) -> None:
    write("additional_chat_templates/rag.jinja", "R{{ documents | length }}" + CHATML)(folder)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for chosen in ("rag", "default", "own {{ messages[0].content }}"):
        assert_same(ours, theirs, QUESTION, chat_template=chosen, documents=[{"title": "t", "text": "x"}])


CONTINUED: dict[str, list[dict[str, Any]]] = {
    "text": [*QUESTION, {"role": "assistant", "content": "The answer is"}],
    "trailing space": [*QUESTION, {"role": "assistant", "content": "The answer is "}],
    "the user's": QUESTION,
    "parts": [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "The"}, {"type": "image"}]}],
    "no text": [*QUESTION, {"role": "assistant", "content": None}],
    "no parts": [*QUESTION, {"role": "assistant", "content": [{"type": "image"}]}],
    "empty": [*QUESTION, {"role": "assistant", "content": ""}],
}


@pytest.mark.parametrize("messages", CONTINUED)
@pytest.mark.parametrize("template", ["chatml", "macro", "content by parts", "system first", "tools is none"])
def test_the_final_message_is_continued(folder: Path, messages: str, template: str) -> None:
    ours, theirs = with_template(folder, TEMPLATES[template])
    options = {"continue_final_message": True}
    assert_same(ours, theirs, CONTINUED[messages], add_generation_prompt=False, **options)
    assert_same(ours, theirs, CONTINUED[messages], add_generation_prompt=True, **options)
