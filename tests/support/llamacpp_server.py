"""A real llama.cpp server, whose model writes the text of a script.

    model = scripted_model(python_of("llamacpp"), tmp_path, chains={"hello": ("Hel", "lo.")})
    async with llamacpp_server(python, model, tmp_path) as server:
        provider = OpenAIProvider(AgentConfig(api_key=server.key, base_url=server.base_url))

A message with `[hello]` in it makes the model write the pieces of `hello`; once tools have answered, it writes those
of `after_tools`. A piece can occur only once in a model.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from support.command import WITHIN_S, Command, command

SCRIPTS = Path(__file__).parent / "llamacpp"
KEY = "sk-local-0123456789abcdef"
AFTER_TOOLS = "after_tools"

# Hermes's form of tool calls and the usual form of reasoning: llama.cpp learns both from the template itself.
TEMPLATE = """\
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}
{%- for message in messages %}{{ message.role }}:
{%- if message.reasoning_content %} <think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{% endfor %}
{%- if add_generation_prompt %}{% set last = messages[-1] %}
{%- if last.role == 'tool' %}<|after_tools|>
%BRANCHES%{% endif %}{% endif %}"""


@dataclass(frozen=True)
class LlamaServer:
    """A running server."""

    process: Command
    base_url: str
    port: int
    key: str = KEY

    async def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process.process.returncode is None:
            self.process.process.kill()
        await self.process.process.wait()


def tool_call(name: str, arguments: str) -> tuple[str, ...]:
    """Return the pieces in which a model writes a call of a tool; the first and the last must not repeat."""
    return (f'<tool_call>\n{{"name": "{name}", ', f'"arguments": {arguments}', "}\n</tool_call>")


def scripted_model(
    python: Path,
    file: Path,
    chains: Mapping[str, Sequence[str]],
    *,
    loops: Mapping[str, Sequence[str]] | None = None,
    openings: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write a model to `file`: its pieces by the word that starts them.

    Args:
        python: Of an environment that has gguf.
        file: Where the model is written.
        chains: Written once.
        loops: Written again and again.
        openings: Written once; what follows is random, as far as a grammar allows.
    """
    groups = {"chains": chains, "loops": loops or {}, "openings": openings or {}}
    words = [word for group in groups.values() for word in group if word != AFTER_TOOLS]
    branches = "".join(f"{{% elif '[{word}]' in last.content %}}<|{word}|>" for word in words)
    script: dict[str, object] = {"template": TEMPLATE.replace("\n%BRANCHES%", branches)}
    for name, group in groups.items():
        script[name] = {f"<|{word}|>": list(pieces) for word, pieces in group.items()}
    words_to_run = (str(python), str(SCRIPTS / "model.py"), str(file))
    made = subprocess.run(words_to_run, input=json.dumps(script), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return file


@asynccontextmanager
async def llamacpp_server(
    python: Path, model: Path, folder: Path, *, port: int = 0, context: int = 4096
) -> AsyncIterator[LlamaServer]:
    """Serve a model on 127.0.0.1 for the length of the block; port 0: a free one."""
    words = (str(python), str(SCRIPTS / "server.py"), str(model), str(port), KEY, str(context))
    async with command(folder, *words) as process:
        async with asyncio.timeout(WITHIN_S):
            await process.wait_for_output("listening at ")
        found = re.search(r"listening at (http://127\.0\.0\.1:(\d+))", process.out)
        assert found, process.out
        yield LlamaServer(process, base_url=f"{found[1]}/v1", port=int(found[2]))
