"""All families, as an export tries them: Qwen2 before Llama, which would fit too, with a zero output bias."""

from triplane.hf.families import alibi, classic, cohere, deepseek, experts, gemma, llama, neox, olmo

FAMILIES = {
    family.model_type: family
    for family in (
        *(llama.QWEN2, llama.LLAMA, llama.MISTRAL, llama.QWEN3, llama.SEED_OSS, llama.MINISTRAL, llama.SMOLLM3),
        *(llama.GRANITE, llama.HELIUM, llama.ERNIE4_5, llama.HUNYUAN, llama.ARCEE, llama.CWM),
        *(olmo.OLMO, olmo.OLMO2, olmo.OLMO3, olmo.EXAONE4, olmo.GLM4),
        *(gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3_TEXT),
        *(cohere.COHERE, cohere.COHERE2),
        *(classic.GPT2, classic.GPT_BIGCODE, classic.OPT, alibi.BLOOM, alibi.MPT),
        *(neox.GPT_NEOX, neox.GPTJ, neox.PHI, neox.PHI3, neox.STARCODER2, neox.STABLELM, neox.NEMOTRON, neox.FALCON),
        *(experts.MIXTRAL, experts.QWEN3_MOE, experts.QWEN2_MOE, experts.OLMOE, experts.GRANITEMOE),
        *(experts.GRANITEMOESHARED, experts.GPT_OSS),
        *(deepseek.DEEPSEEK_V3, deepseek.DEEPSEEK_V2),
        *(gemma.GEMMA3, llama.INTERNLM3, llama.IQUESTCODER),
    )
}
