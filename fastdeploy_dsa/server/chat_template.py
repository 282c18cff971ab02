"""From the messages of a conversation to the text of a prompt, by the model's own Jinja template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdeploy_dsa.strict_json import read_json_object

TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# What expressions and filters raise for messages and options that the template was not written for.
_REFUSALS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; a prompt has what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope of its own, as in transformers: what is set inside is not known behind it."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatTemplate:
    """A template, in the sandbox and with the functions that templates of Hugging Face folders expect."""

    def __init__(self, source: str, *, origin: Path, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: Its text.
            origin: Where it comes from, for messages.
            special_tokens: Their texts by name, such as bos_token.

        Raises:
            ValueError: It is not Jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json  # Jinja's own escapes for HTML
        environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"{origin}: expected a Jinja template: line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
        """The prompt, with the beginning of the assistant's next message; it has its special tokens.

        Args:
            messages: With "role" and "content".
            options: Further variables of the template.

        Raises:
            ValueError: The template refuses the messages.
        """
        variables = {"tools": None, "documents": None, **self._special_tokens, **options}
        try:
            return self._template.render({**variables, "messages": messages, "add_generation_prompt": True})
        except _REFUSALS as error:
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from error


def load_chat_template(folder: Path, path: Path | None = None) -> ChatTemplate | None:
    """The chat template of a model.

    Args:
        folder: Of the model: its chat_template.jinja, else what tokenizer_config.json says.
        path: A file to read instead.

    Returns:
        None if the folder has none.

    Raises:
        ValueError: A file is not what its name says.
    """
    config_path = folder / _CONFIG_FILE
    config = read_json_object(config_path, ValueError) if config_path.exists() else {}
    special_tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name))) is not None}
    if path is None and (folder / TEMPLATE_FILE).exists():
        path = folder / TEMPLATE_FILE
    if path is not None:
        try:
            source: object = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a chat template, got a file that cannot be read: {error}") from error
    else:
        path, source = config_path, _default_of(config.get("chat_template"))
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{path}: chat_template: expected text, got {type(source).__name__}")
    return ChatTemplate(source, origin=path, special_tokens=special_tokens)


def _default_of(value: object) -> object:
    """A model may have several templates, as a list of names and texts."""
    if not isinstance(value, list):
        return value
    named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
    return named[0].get("template") if named else None


def _token_text(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # the reader's day
