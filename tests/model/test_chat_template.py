"""Templates in the sandbox: forbidden operations, messages without text, and prompts that end inside ``<think>``."""

from __future__ import annotations

from typing import Any

import pytest

from trimode.common.errors import TriModeError
from trimode.model.chat_template import ChatPrompt, ChatTemplate

USER = {"role": "user", "content": "x"}


def render(source: str, messages: list[Any], **options: Any) -> ChatPrompt:
    return ChatTemplate(source).render(messages, **{"variables": {}} | options)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ namespace.__init__.__globals__ }}{{ 1 / 0 }}",
        "{{ messages[1].content.format_map.__self__.__class__.__base__ }}{{ 1 / 0 }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'a': 1}) %}",
        "{{ raise_exception('no system turn, please') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ 1 / none }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(TriModeError, match="the chat template refuses the conversation: "):
        render(source, [USER, {"role": "assistant"}])


def test_objects_reach_no_template() -> None:
    class Message:
        def model_dump(self) -> dict[str, Any]:
            return USER

    source = "{{ messages[0].content }}{{ messages[0].model_dump is defined }}"
    assert render(source, [Message()]).text == "xFalse"
    with pytest.raises(TriModeError, match="a object cannot be given to a chat template"):
        render(source, [USER | {"content": object()}])


@pytest.mark.parametrize(
    ("messages", "options", "refused"),
    [
        ([], {}, "the conversation is empty"),
        ("x", {}, "messages must be a list of objects"),
        (["x"], {}, "messages must be a list of objects"),
        ([USER], {"tools": ["x"]}, "tools must be a list of objects"),
        ([USER], {"documents": "x"}, "documents must be a list of objects"),
        ([USER], {"variables": {"messages": []}}, "messages is reserved and cannot be a template variable"),
        ([USER], {"continue_final_message": True}, "needs add_generation_prompt=False"),
    ],
)
def test_a_malformed_conversation_is_refused(messages: Any, options: dict[str, Any], refused: str) -> None:
    with pytest.raises(TriModeError, match=refused):
        render("{{ messages }}", messages, **options)


@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": None}])
@pytest.mark.parametrize(
    "expression",
    [
        "m.content",
        "'a' + m.content",
        "m['content'] + 'a'",
        "m.content ~ 'a'",
        "m.content | trim",
        "m.content | length",
        "m.content.split('</think>')[-1]",
        "m['content'].strip().startswith('a')",
        "m.content[:5]",
        "'a' in m.content",
        "m.content or 'none'",
        "m.content | default('none', true)",
    ],
)
def test_content_that_is_null_is_empty_text(message: dict[str, Any], expression: str) -> None:
    source = f"{{% set m = messages[0] %}}{{{{ {expression} }}}}"
    assert render(source, [message]) == render(source, [message | {"content": ""}])


THINKS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PLAIN = THINKS + "{% if add_generation_prompt %}<assistant>{% endif %}"
OPEN, SHUT = PLAIN + "<think>\n", PLAIN + "<think></think>"


@pytest.mark.parametrize(
    ("source", "content", "thinking"),
    [
        (PLAIN, "x", False),
        (PLAIN, "What does <think> mean?", False),
        (PLAIN, "<thi<think>nk>", False),
        (PLAIN, "</think><think>", False),
        (OPEN, "x", True),
        (OPEN, "</think>", True),
        (OPEN, "<think>x</think>", True),
        (SHUT, "x", False),
        (SHUT, "<think>", False),
        (PLAIN + "{{ '<think>' if 'deeply' in messages[-1].content }}", "Think deeply, <think>", True),
        (PLAIN + "{{ '<think>' if 'deeply' in messages[-1].content }}", "<think>", False),
    ],
)
def test_only_the_template_opens_a_thought(source: str, content: str, thinking: bool) -> None:
    prompt = render(source, [{"role": "user", "content": content}])
    assert prompt.thinking == thinking
    assert content in prompt.text


def test_earlier_turns_tools_and_documents_open_no_thought() -> None:
    marked = {"name": "<think>"}
    source = PLAIN + "{{ tools }}{{ documents }}"
    parts = {"role": "user", "content": [{"type": "text", "text": "<think>"}]}
    messages = [{"role": "system", "content": "<think>"}, {"role": "assistant", "content": "<think>cut"}, parts]
    prompt = render(source, messages, tools=[marked], documents=[marked])
    assert prompt.text.endswith("[{'name': '<think>'}]")
    assert not prompt.thinking


@pytest.mark.parametrize(
    ("content", "thinking"), [("<think>Let me", True), ("<think>Yes.</think>The", False), ("The", False)]
)
def test_a_thought_that_is_continued(content: str, thinking: bool) -> None:
    messages = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": content}]
    prompt = render(PLAIN, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt == (f"<user><think><assistant>{content}", thinking)
