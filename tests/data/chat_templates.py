"""How six families write a conversation, in templates of our own that mark what the model says with ``{% generation %}``.

transformers makes its assistant masks from those marks; the package never looks at them.
"""

LLAMA3 = """{{ bos_token }}{% set today = strftime_now('%d %b %Y') %}{% if messages[0].role == 'system' %}
{%- set said = messages[0].content | trim %}{% set turns = messages[1:] %}
{%- else %}{% set said = '' %}{% set turns = messages %}{% endif -%}
<|start_header_id|>system<|end_header_id|>{{ '\n\n' }}Today Date: {{ today }}{{ '\n\n' + said }}<|eot_id|>
{%- for m in turns %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

CHATML = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a plain helper.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# What was thought is left out of answers before the user's last turn, and the last answer gets an empty thought.
QWEN3 = """{% set ns = namespace(last=-1) %}{% for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- generation %}{{ said + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""

GEMMA2 = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no turn of the system here') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
{%- if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}{{ m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}
{%- else %}{{ '<start_of_turn>' + m.role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

GEMMA3 = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}
{%- generation %}{{ m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}
{%- else %}{{ '<start_of_turn>' + m.role + '\n' + (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}
{%- set turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns %}{% if m.role == 'user' %}{{ '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""

# Template, and the control tokens that begin a text and end an answer.
FAMILIES = {
    "llama-3.1": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen2.5": (CHATML, "<|endoftext|>", "<|im_end|>"),
    "qwen3": (QWEN3, "<|endoftext|>", "<|im_end|>"),
    "gemma-2": (GEMMA2, "<bos>", "<end_of_turn>"),
    "gemma-3": (GEMMA3, "<bos>", "<end_of_turn>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "smollm2": (CHATML, "<|im_start|>", "<|im_end|>"),
}
CONTROL = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>",
    "<eos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>",
)  # fmt: skip
