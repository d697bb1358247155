"""Fields of TensorRT-LLM's ``SamplingParams`` that TriMode lacks, each with the reason or TriMode's own way."""

from __future__ import annotations

from collections.abc import Iterable

from trimode.common.errors import TriModeError

_BEAMS = "beam search is not supported"
_TOP_P = "top_p does not change within an answer"
_TENSORS = "log-probabilities are the only tensors returned; give logprobs or prompt_logprobs"
REASONS = {
    name: reason
    for reason, names in (
        (_BEAMS, ("use_beam_search", "beam_width", "beam_width_array", "beam_search_diversity_rate")),
        (_BEAMS, ("length_penalty", "early_stopping")),
        (_TOP_P, ("top_p_min", "top_p_reset_ids", "top_p_decay")),
        (_TENSORS, ("return_context_logits", "return_generation_logits", "return_encoder_output")),
        (_TENSORS, ("additional_model_outputs",)),
        ("every answer is returned; give n and choose by cumulative_logprob", ("best_of",)),
        ("the checkpoint names the end tokens; give stop_token_ids or ignore_eos", ("end_id", "pad_id")),
        ("give max_tokens", ("max_new_tokens",)),
        ("give logit_bias", ("embedding_bias",)),
        ("give logits_processor", ("apply_batched_logits_processor",)),
        ("give mode or lookup", ("lookahead_config",)),
        ("n-grams are not counted; give repetition_penalty", ("no_repeat_ngram_size",)),
        ("repetition_penalty counts the whole prompt", ("prompt_ignore_length",)),
        ("prompts are not truncated", ("truncate_prompt_tokens",)),
        ("give token ids to choose the prompt's special tokens", ("add_special_tokens",)),
        ("the tokenizer's own spacing is used", ("spaces_between_special_tokens",)),
        ("every answer has its text and its token_ids", ("detokenize",)),
        ("an answer never includes the prompt", ("exclude_input_from_output",)),
        ("every answer has its counts and times", ("return_perf_metrics",)),
    )
    for name in names
}


def refuse_foreign_fields(names: Iterable[str]) -> None:
    """Raise TriModeError for the first name of a field that TriMode lacks. Other names are not checked."""
    for name in names:
        if name in REASONS:
            raise TriModeError(f"SamplingParams has no {name}: {REASONS[name]}")
