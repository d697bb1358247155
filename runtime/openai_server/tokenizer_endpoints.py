"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, in the shapes of vLLM."""

from __future__ import annotations

import json

from fastapi import Request
from fastapi.responses import Response

from trimode.engine.files import TOKENIZER
from trimode.runtime.openai_server.chat import encode_chat
from trimode.runtime.openai_server.http_errors import BAD_REQUEST, ApiError
from trimode.runtime.openai_server.request_bodies import ChatTokenizeRequest, DetokenizeRequest, TextTokenizeRequest
from trimode.runtime.openai_server.response_bodies import Detokenized, Tokenized, TokenizerInfo
from trimode.runtime.openai_server.service import Service, json_response


async def tokenize(service: Service, body: ChatTokenizeRequest | TextTokenizeRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    service.names.resolve(body.model)
    if isinstance(body, ChatTokenizeRequest):
        tokens = (await encode_chat(service, body)).token_ids
    else:
        tokens = await service.encode(body.prompt, body, body.add_special_tokens is not False)
    texts = [service.llm.tokenizer.token(token) for token in tokens] if body.return_token_strs else None
    record = Tokenized(count=len(tokens), max_model_len=service.context_length, tokens=tokens, token_strs=texts)
    return json_response(record, headers)


async def detokenize(service: Service, body: DetokenizeRequest, http: Request) -> Response:
    headers = service.report_ignored_fields(body, http)
    service.names.resolve(body.model)
    vocabulary = service.llm.manifest.model.vocab_size
    for token in body.tokens:
        if token >= vocabulary:
            raise ApiError(BAD_REQUEST, f"the token {token} is outside the vocabulary of {vocabulary}", "tokens")
    return json_response(
        Detokenized(prompt=service.llm.tokenizer.decode(body.tokens, skip_special_tokens=False)), headers
    )


def tokenizer_info(service: Service) -> Response:
    """The engine's ``tokenizer_config.json`` with its chat template."""
    folder = service.llm.folder / TOKENIZER
    config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    found = json.loads(config.read_text(encoding="utf-8-sig")) if config.exists() else {}
    if template.exists():
        found["chat_template"] = template.read_text(encoding="utf-8-sig")
    return json_response(TokenizerInfo(**{"tokenizer_class": "PreTrainedTokenizerFast"} | found))
