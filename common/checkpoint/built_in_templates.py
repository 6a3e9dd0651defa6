"""Chat templates of families whose checkpoints come with none, by architecture. Used where a
directory has no template of its own."""

from __future__ import annotations

_DEEPSEEK_V4 = """\
{%- if tools -%}{{ raise_exception("it renders no tools") }}{%- endif -%}
{%- if reasoning_effort is defined and reasoning_effort not in (none, "high") -%}
{{ raise_exception("it knows the reasoning effort high alone") }}
{%- endif -%}
{%- set seen = namespace(last_user=-1, role="") -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}{%- set seen.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- "<BARbeginLOWofLOWsentenceBAR>" -}}
{%- for message in messages -%}
{%- if message.role == "system" -%}
{{- message.content -}}
{%- elif message.role == "user" -%}
{{- "\\n\\n" if seen.role == "user" else "<BARUserBAR>" -}}{{- message.content -}}
{%- elif message.role == "assistant" -%}
{%- set thinks = thinking and loop.index0 > seen.last_user -%}
{%- if seen.role == "user" -%}
{{- "<BARAssistantBAR>" ~ ("<think>" if thinks else "") -}}
{%- endif -%}
{%- if thinks -%}{{- message.reasoning_content or "" -}}{%- endif -%}
{{- "</think>" if seen.role == "user" or thinks else "" -}}
{{- message.content or "" -}}{{- "<BARendLOWofLOWsentenceBAR>" -}}
{%- else -%}
{{ raise_exception("it knows the roles system, user and assistant") }}
{%- endif -%}
{%- set seen.role = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt and seen.role == "user" -%}
{{- "<BARAssistantBAR>" ~ ("<think>" if thinking else "</think>") -}}
{%- endif -%}
"""
"""Chat mode, or with the variable `thinking` a turn that begins by thinking. What was thought
before the last user turn is left out; user turns that follow each other are one of several parts.
"""

BUILT_IN = {
    "deepseek_v4": _DEEPSEEK_V4.replace("BAR", "\N{FULLWIDTH VERTICAL LINE}").replace(
        "LOW", "\N{LOWER ONE EIGHTH BLOCK}"
    ),
}
