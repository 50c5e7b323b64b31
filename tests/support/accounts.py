"""A server with accounts: LOOM for phases, hosts and operators, and one for each submitter, named as its token."""

from loom.runner.server.nats_server import find_server

PASSWORD = "pw"
EXPORTS = """
      { service: "loom.from.*.submit", account_token_position: 3, response_threshold: "25h" }
      { service: "loom.from.*.status.*", account_token_position: 3 }
      { service: "loom.from.*.cancel.*", account_token_position: 3 }
      { service: "loom.intake.*.*.*", account_token_position: 3 }
      { stream: "loom.result.*.*", account_token_position: 3 }
      { stream: "loom.delta.*.*", account_token_position: 3 }
      { stream: "loom.subtask.*.*", account_token_position: 3 }
"""
"""The server sets the third token to the name of the importing account."""
PERMISSIONS = """
        publish: { allow: ["loom.submit", "loom.status.*", "loom.cancel.*", "loom.intake.public.*.*"] }
        subscribe: { allow: ["_INBOX.>", "loom.result.public.*", "loom.delta.public.*", "loom.subtask.public.*"] }
"""
"""All that a client of a submitter needs."""


def imports(submitter: str) -> str:
    """Return the imports that map the plain subjects and the name `public` to a submitter's own subjects."""
    return f"""
      {{ service: {{ account: LOOM, subject: "loom.from.{submitter}.submit" }}, to: "loom.submit" }}
      {{ service: {{ account: LOOM, subject: "loom.from.{submitter}.status.*" }}, to: "loom.status.*" }}
      {{ service: {{ account: LOOM, subject: "loom.from.{submitter}.cancel.*" }}, to: "loom.cancel.*" }}
      {{ service: {{ account: LOOM, subject: "loom.intake.{submitter}.*.*" }}, to: "loom.intake.public.*.*" }}
      {{ stream: {{ account: LOOM, subject: "loom.result.{submitter}.*" }}, to: "loom.result.public.$1" }}
      {{ stream: {{ account: LOOM, subject: "loom.delta.{submitter}.*" }}, to: "loom.delta.public.$1" }}
      {{ stream: {{ account: LOOM, subject: "loom.subtask.{submitter}.*" }}, to: "loom.subtask.public.$1" }}
"""


def account(name: str, *, submitter: str = "") -> str:
    """Return a submitter's account: the user of its name has least permissions, that of `<name>-free` all of its own.

    Args:
        submitter: Whose subjects it imports; absent: those of its own name.
    """
    return f"""
  {name} {{
    users: [ {{ user: "{name}", password: {PASSWORD}, permissions: {{ {PERMISSIONS} }} }}
             {{ user: "{name}-free", password: {PASSWORD} }} ]
    imports: [ {imports(submitter or name)} ]
  }}
"""


def accounts(store: str, *others: str) -> str:
    """Return a configuration with the account LOOM, its streams in the folder `store`, and others as `account` has."""
    return f"""
jetstream {{ store_dir: "{store}" }}
accounts {{
  LOOM {{
    jetstream: enabled
    users: [ {{ user: loom, password: {PASSWORD} }} ]
    exports: [ {EXPORTS} ]
  }}
{"".join(others)}
}}
"""


def check_command(conf: str) -> tuple[str, ...]:
    """Return the command by which a server only tests a configuration file."""
    return (find_server()[0], "-t", "-c", conf)


def permitted(store: str, submitter: str) -> str:
    """Return a configuration without accounts: user `loom` may do all, a user of the submitter's name its own alone."""
    names = ("submit", "status.*", "cancel.*")
    publish = ", ".join(f'"loom.from.{submitter}.{name}"' for name in names) + f', "loom.intake.{submitter}.*.*"'
    families = ", ".join(f'"loom.{family}.{submitter}.*"' for family in ("result", "delta", "subtask"))
    permissions = f'{{ publish: {{ allow: [{publish}] }}, subscribe: {{ allow: ["_INBOX.>", {families}] }} }}'
    return f"""
jetstream {{ store_dir: "{store}" }}
authorization {{ users: [
  {{ user: loom, password: {PASSWORD} }}
  {{ user: "{submitter}", password: {PASSWORD}, permissions: {permissions} }}
] }}
"""
