"""One decoder for Llama, Mistral, Qwen2, Gemma and Gemma 2, its weights and its LoRA adapters."""
