"""Chat templates of model folders: where they come from, what they may use, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_dsa.installation import DEMO_MODEL
from fastdeploy_dsa.server.chat_template import ChatTemplate, load_chat_template

MESSAGES = [{"role": "user", "content": "hello"}]
ONE_LINE = "{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}<assistant>"


def write_config(folder: Path, **content: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


def rendered(folder: Path, messages: list[dict[str, str]] = MESSAGES, **options: Any) -> str:
    template = load_chat_template(folder)
    assert template is not None
    return template.render(messages, options)


def compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, origin=Path("template"), special_tokens={})


def test_the_template_of_tokenizer_config_is_used_with_its_special_tokens(tmp_path: Path) -> None:
    source = "{{ bos_token }}" + ONE_LINE + "{{ eos_token }}{{ pad_token }}"
    write_config(tmp_path, chat_template=source, bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None)
    assert rendered(tmp_path) == "<s><user>hello<assistant></s>"


def test_a_file_of_its_own_comes_before_it_and_a_chosen_file_before_both(tmp_path: Path) -> None:
    write_config(tmp_path, chat_template="from the config")
    (tmp_path / "chat_template.jinja").write_text("from the folder", encoding="utf-8")
    chosen = tmp_path / "other.jinja"
    chosen.write_text("chosen", encoding="utf-8")
    assert rendered(tmp_path) == "from the folder"
    template = load_chat_template(tmp_path, chosen)
    assert template is not None
    assert template.render(MESSAGES, {}) == "chosen"


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": ONE_LINE}]
    write_config(tmp_path, chat_template=named)
    assert rendered(tmp_path) == "<user>hello<assistant>"
    write_config(tmp_path, chat_template=named[:1])
    assert load_chat_template(tmp_path) is None


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    write_config(tmp_path, bos_token="<s>")
    assert load_chat_template(tmp_path) is None


def test_templates_find_what_they_expect() -> None:
    source = (
        "{%- if tools is none and add_generation_prompt %}\n"
        "    {%- for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}\n"
        "{%- endif %}"
        "{{ thinking }} {{ strftime_now('%Y') | length }}"
    )
    messages = [*MESSAGES, {"role": "user", "content": "<ä>"}]
    assert compiled(source).render(messages, {"thinking": "yes"}) == '{"role": "user", "content": "<ä>"}yes 4'


def test_the_mark_of_what_a_model_is_trained_on_is_not_part_of_the_prompt() -> None:
    source = (
        "{% set word = 'outer' %}{% for m in messages %}\n"
        "    {% generation %}\n"
        "{% set word = 'inner' %}<{{ loop.index }}{{ m.content }}{{ word }}>\n"
        "    {%- endgeneration -%}\n"
        "{{ word }}{% endfor %}{{ word }}"
    )
    # As transformers renders it.
    assert compiled(source).render(MESSAGES, {}) == "<1helloinner>outerouter"
    with pytest.raises(ValueError, match=r"template: expected a Jinja template: line 1: .*endgeneration"):
        compiled("{% generation %}")


def test_options_replace_neither_messages_nor_the_generation_prompt() -> None:
    options = {"messages": [], "add_generation_prompt": False}
    assert compiled("{{ messages | length }} {{ add_generation_prompt }}").render(MESSAGES, options) == "1 True"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_a_value_error(source: str) -> None:
    with pytest.raises(ValueError, match="messages: the model's chat template refuses them: "):
        compiled(source).render(MESSAGES, {})


def test_files_that_are_no_templates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jinja: expected a chat template"):
        load_chat_template(tmp_path, tmp_path / "absent.jinja")
    (tmp_path / "chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: expected a Jinja template: line 1"):
        load_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    write_config(tmp_path, chat_template=3)
    with pytest.raises(ValueError, match="chat_template: expected text, got int"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load_chat_template(tmp_path)


def test_the_demo_models_template_writes_the_lines_it_was_trained_on() -> None:
    messages = [
        {"role": "system", "content": "A fact."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": " That."},
        {"role": "user", "content": "And?"},
    ]
    assert rendered(DEMO_MODEL, messages) == "<bos>A fact.\nQ: What?\nA: That.\nQ: And?\nA:"


@pytest.mark.parametrize(
    "source", ["{{ limits | dictsort }}", "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(limits) }}"]
)
def test_an_option_that_the_template_cannot_work_with_is_the_requests_mistake(source: str) -> None:
    template = ChatTemplate(source, origin=Path("here"), special_tokens={})
    with pytest.raises(ValueError, match="messages: the model's chat template refuses them: "):
        template.render([{"role": "user", "content": "a"}], {"limits": 5})
