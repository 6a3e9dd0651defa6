"""The chat template of DeepSeek-V4, whose checkpoints come with none.

What stands where, the marks and the newlines are the model's. The texts that describe tools and ask
for the most thought are this project's words: the released ones are no part of a checkpoint's data.

Variables: `thinking`; `reasoning_effort` ("high", or "max" while thinking); `tools`. A message may
bring `tools` too (system, developer). What was thought before the last turn of a user is left out,
and a developer's messages there with it, unless somebody defines tools. Messages of users,
developers and tools that follow each other are one turn; results go in the order of the calls.
"""

from __future__ import annotations

_TEMPLATE = """\
{%- set begin = "<BARbeginLOWofLOWsentenceBAR>" -%}
{%- set end = "<BARendLOWofLOWsentenceBAR>" -%}
{%- set mark = "BARDSMLBAR" -%}
{%- set turns = ("user", "developer", "tool") -%}
{%- set thinks = thinking is defined and thinking -%}
{%- set effort = reasoning_effort if reasoning_effort is defined else none -%}
{%- if effort not in (none, "high", "max") -%}
{{ raise_exception("it knows the reasoning efforts high and max") }}
{%- endif -%}

{%- macro described(functions) -%}
{{- "\\n\\n## Tools\\n\\nYou may call the functions below. A call ends your answer and has "
  ~ "this form:\\n\\n<" ~ mark ~ "tool_calls>\\n<" ~ mark ~ 'invoke name="FUNCTION">\\n<' ~ mark
  ~ 'parameter name="PARAMETER" string="true|false">VALUE</' ~ mark ~ "parameter>\\n</" ~ mark
  ~ "invoke>\\n</" ~ mark ~ "tool_calls>\\n\\nSeveral invokes may follow each other in one block. "
  ~ 'A value is plain text where string="true", and JSON where string="false".\\n\\n'
  ~ "The functions, one a line:\\n" -}}
{%- for each in functions -%}{{- "\\n" ~ (each.function | tojson) -}}{%- endfor -%}
{%- endmacro -%}

{%- macro parameter(name, value) -%}
{%- set plain = value is string -%}
{{- "\\n<" ~ mark ~ 'parameter name="' ~ name ~ '" string="' ~ ("true" if plain else "false")
  ~ '">' ~ (value if plain else value | tojson) ~ "</" ~ mark ~ "parameter>" -}}
{%- endmacro -%}

{%- macro called(calls) -%}
{{- "\\n\\n<" ~ mark ~ "tool_calls>" -}}
{%- for call in calls -%}
{{- "\\n<" ~ mark ~ 'invoke name="' ~ call.function.name ~ '">' -}}
{%- set given = call.function.arguments -%}
{%- for name, value in (given if given is mapping else {"arguments": given}).items() -%}
{{- parameter(name, value) -}}
{%- endfor -%}
{{- "\\n</" ~ mark ~ "invoke>" -}}
{%- endfor -%}
{{- "\\n</" ~ mark ~ "tool_calls>" -}}
{%- endmacro -%}

{%- macro result(message, first) -%}
{{- "" if first else "\\n\\n" -}}{{- "<tool_result>" ~ message.content ~ "</tool_result>" -}}
{%- endmacro -%}

{%- set seen = namespace(last=-1, role="", calls=[], defined=tools, systems=0, opened=false) -%}
{%- for message in messages -%}
{%- if message.role in turns -%}{%- set seen.last = loop.index0 -%}{%- endif -%}
{%- if message.role == "system" -%}{%- set seen.systems = seen.systems + 1 -%}{%- endif -%}
{%- if message.tools -%}{%- set seen.defined = true -%}{%- endif -%}
{%- endfor -%}
{%- set drops = thinks and not seen.defined -%}

{{- begin -}}
{%- if thinks and effort == "max" -%}
{{- "Reasoning effort: max. Think for as long as it helps: try every way that could be right, look "
  ~ "for what speaks against each, and check the result before you answer.\\n\\n" -}}
{%- endif -%}
{%- if tools and not seen.systems -%}{{- described(tools) -}}{%- endif -%}
{%- set seen.systems = 0 -%}
{%- for message in messages -%}
{%- if message.response_format -%}
{{ raise_exception("it renders no response format") }}
{%- endif -%}
{%- if message.role == "system" -%}
{{- message.content -}}
{%- if message.tools -%}{{- described(message.tools) -}}{%- endif -%}
{%- if tools and not seen.systems -%}{{- described(tools) -}}{%- endif -%}
{%- set seen.systems = seen.systems + 1 -%}
{%- elif message.role == "developer" and drops and loop.index0 < seen.last -%}
{%- elif message.role in ("user", "developer") -%}
{{- "\\n\\n" if seen.opened else "<BARUserBAR>" -}}{{- message.content -}}
{%- if message.tools -%}{{- described(message.tools) -}}{%- endif -%}
{%- set seen.opened = true -%}
{%- elif message.role == "tool" -%}
{%- if seen.role != "tool" -%}
{%- set run = namespace(found=[]) -%}
{%- for other in messages[loop.index0:] -%}
{%- if other.role != "tool" -%}{%- break -%}{%- endif -%}
{%- set run.found = run.found + [other] -%}
{%- endfor -%}
{{- "\\n\\n" if seen.opened else "<BARUserBAR>" -}}
{%- set run.first = true -%}
{%- set ids = seen.calls | map(attribute="id") | list -%}
{%- for id in ids -%}
{%- for other in run.found if other.tool_call_id == id -%}
{{- result(other, run.first) -}}{%- set run.first = false -%}
{%- endfor -%}
{%- endfor -%}
{%- for other in run.found if other.tool_call_id not in ids -%}
{{- result(other, run.first) -}}{%- set run.first = false -%}
{%- endfor -%}
{%- endif -%}
{%- set seen.opened = true -%}
{%- elif message.role == "assistant" -%}
{%- set thought = thinks and (seen.defined or loop.index0 > seen.last) -%}
{%- if seen.opened -%}{{- "<BARAssistantBAR>" ~ ("<think>" if thought else "") -}}{%- endif -%}
{%- if thought -%}{{- message.reasoning_content or "" -}}{%- endif -%}
{{- "</think>" if seen.opened or thought else "" -}}
{{- message.content or "" -}}
{%- set seen.calls = message.tool_calls or [] -%}
{%- if seen.calls -%}{{- called(seen.calls) -}}{%- endif -%}
{{- end -}}
{%- set seen.opened = false -%}
{%- else -%}
{{ raise_exception("it knows the roles system, developer, user, assistant and tool") }}
{%- endif -%}
{%- set seen.role = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt and seen.opened -%}
{{- "<BARAssistantBAR>" ~ ("<think>" if thinks else "</think>") -}}
{%- endif -%}
"""

DEEPSEEK_V4 = _TEMPLATE.replace("BAR", "\N{FULLWIDTH VERTICAL LINE}").replace(
    "LOW", "\N{LOWER ONE EIGHTH BLOCK}"
)
