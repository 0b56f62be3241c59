"""One decoder for Llama, Mistral, Qwen2 and 3, Gemma, Gemma 2 and 3, its weights and its LoRA adapters."""
