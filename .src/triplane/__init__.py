"""triplane pretrains decoder-only language models over tensor, pipeline and data parallel ranks."""
