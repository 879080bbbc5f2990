"""Hugging Face models that cannot be read, and what they have that this model lacks. Imports no torch."""

from typing import Any

_STATES = "layers other than attention"
_BIDIRECTIONAL = "bidirectional attention"
_WRAPPER = "a vision or audio part around the text model"

_LACKING = {
    "bamba": _STATES,
    "bert": _BIDIRECTIONAL,
    "jamba": _STATES,
    "kimi_linear": _STATES,
    "lfm2": _STATES,
    "llama4": _WRAPPER,
    "llava": _WRAPPER,
    "mamba": _STATES,
    "mistral3": _WRAPPER,
    "modernbert": _BIDIRECTIONAL,
    "nemotron_h": _STATES,
    "qwen3_5": _WRAPPER,
    "qwen3_next": _STATES,
    "roberta": _BIDIRECTIONAL,
    "t5": "an encoder",
}


def family_problem(hf: dict[str, Any], families: list[str]) -> str | None:
    """Returns why config.json describes none of `families`; None if it does."""
    readable = f"this model reads {', '.join(families)}"
    if "model_type" not in hf:
        return f"no model_type; {readable}"
    model_type = hf["model_type"]
    if isinstance(model_type, str) and model_type in families:
        return None
    lacking = _LACKING.get(model_type) if isinstance(model_type, str) else None
    if lacking is None and "text_config" in hf:
        lacking = _WRAPPER
    if lacking is None and hf.get("is_encoder_decoder"):
        lacking = "an encoder"
    has = f", which has {lacking}" if lacking else ""
    return f"model_type is {str(model_type)[:60]!r}{has}; {readable}"


_DEQUANTIZERS = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Classes of transformers that turn weights back, by what config.json calls the method."""


def weights_problem(hf: dict[str, Any]) -> str | None:
    """Returns why the weights of a config.json cannot be read: they are quantized; None if they are not."""
    if not (table := hf.get("quantization_config")):
        return None
    method = str(table.get("quant_method") if isinstance(table, dict) else table)[:60]
    turned = "give a folder whose weights have 16 bits or more"
    if method in _DEQUANTIZERS:
        turned = (
            f"load the folder by transformers with quantization_config={_DEQUANTIZERS[method]}(dequantize=True), and "
            "save it by save_pretrained"
        )
    return f"its weights are quantized ({method}), and such are not read; {turned}"
