"""Chat templates: the text is transformers' own, and a model without one refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.gateway.chat import read_chat_template
from services.gateway.prompts import Prompts
from services.gateway.refusal import Refusal
from tests.checkpoints import make_tokenizer

CHATML = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'oven' %}{{ raise_exception('no ovens') }}{% endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim }}
    {%- if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}
{% generation %}{{ messages | tojson }}{% endgeneration %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
TURNS = [
    {"role": "system", "content": "Be <brief> & kind. "},
    {"role": "user", "content": "naïve €?"},
]


def folder_with(tmp_path: Path, template: Any, own_file: bool) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path, save_jinja_files=own_file)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    return tmp_path


@pytest.mark.parametrize("own_file", [True, False])
def test_the_text_is_transformers_own(tmp_path: Path, own_file: bool) -> None:
    folder = folder_with(tmp_path, CHATML, own_file)
    tokenizer = make_tokenizer()
    expected = tokenizer.apply_chat_template(
        TURNS, chat_template=CHATML, add_generation_prompt=True, tokenize=False
    )
    template = read_chat_template(folder)
    assert template is not None
    assert template.render(TURNS) == expected
    ids = Prompts(folder, context=4096).read(tuple(TURNS))
    assert list(ids) == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_the_default_of_several_is_taken(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "tool", "template": "t"}], "bos_token": {"content": "<s>"}}
    config["chat_template"].append({"name": "default", "template": "{{ bos_token }}d"})  # type: ignore[attr-defined]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = read_chat_template(tmp_path)
    assert template is not None
    assert template.render(TURNS) == "<s>d"


def test_what_the_template_refuses_is_refused(tmp_path: Path) -> None:
    template = read_chat_template(folder_with(tmp_path, CHATML, own_file=True))
    assert template is not None
    with pytest.raises(Refusal, match="no ovens"):
        template.render([{"role": "oven", "content": ""}])


def test_the_template_is_sandboxed(tmp_path: Path) -> None:
    evil = "{{ messages.__class__.__base__.__subclasses__() }}"
    template = read_chat_template(folder_with(tmp_path, evil, own_file=True))
    assert template is not None
    with pytest.raises(Refusal, match="unsafe"):
        template.render(TURNS)


def test_a_broken_template_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=tmp_path.name):
        read_chat_template(folder_with(tmp_path, "{% if %}", own_file=True))


def test_no_template(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    make_tokenizer().save_pretrained(tmp_path)
    assert read_chat_template(tmp_path) is None
