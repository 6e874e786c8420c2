"""Chat templates by name, for models that bring none.

Each writes BOS itself where the tokenizer has one, and ends an assistant turn with a token that a server can stop on.
The formats are those of the models they are named after; the text is ours.
"""

_ALTERNATE = """\
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('After an optional system message, user and assistant messages must alternate.') }}
{%- endif %}
"""

_SPLIT_SYSTEM = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
"""

CHATML = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA2 = (
    _SPLIT_SYSTEM
    + """\
{%- for message in turns %}
"""
    + _ALTERNATE
    + """\
    {%- if message.role == 'user' %}
        {{- bos_token }}
        {{- '[INST] ' }}
        {%- if loop.first and system %}
            {{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}
        {%- endif %}
        {{- message.content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
)

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GEMMA = (
    "{{- bos_token }}\n"
    + _SPLIT_SYSTEM
    + """\
{%- for message in turns %}
"""
    + _ALTERNATE
    + """\
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {%- if loop.first and system %}
        {{- system + '\\n\\n' }}
    {%- endif %}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""
)

ZEPHYR = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

ALPACA = (
    "{{- bos_token }}\n"
    + _SPLIT_SYSTEM
    + """\
{%- if system %}
    {{- system }}
{%- else %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '\\n\\n### Instruction:\\n' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '\\n\\n### Response:\\n' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('After an optional system message, only user and assistant messages are known.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\n### Response:\\n' }}
{%- endif %}
"""
)

VICUNA = (
    "{{- bos_token }}\n"
    + _SPLIT_SYSTEM
    + """\
{%- if system %}
    {{- system }}
{%- else %}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions." }}
{%- endif %}
{%- for message in turns %}
"""
    + _ALTERNATE
    + """\
    {%- if message.role == 'user' %}
        {{- (' ' if loop.first else '') + 'USER: ' + message.content }}
    {%- else %}
        {{- ' ASSISTANT: ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' ASSISTANT:' }}
{%- endif %}
"""
)

TEMPLATES: dict[str, str] = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "alpaca": ALPACA,
    "vicuna": VICUNA,
}
