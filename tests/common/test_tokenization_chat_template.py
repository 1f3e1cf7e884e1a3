"""Conversations to prompts, against Transformers where it has an answer."""

import json

import pytest

from common.config import TINY_MODEL
from common.errors import FailedPrecondition, InvalidArgument
from common.tokenization import ChatMessage, ChatTemplate, Tokenizer

TURNS = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hé <b>?")]


def _folder(tmp_path, template, **config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return tmp_path


def test_the_bundled_model_reads_what_transformers_would_give_it():
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(TINY_MODEL).apply_chat_template(
        [turn._asdict() for turn in TURNS], add_generation_prompt=True, tokenize=False
    )
    assert Tokenizer.load(TINY_MODEL).chat_template.render(TURNS) == expected


def test_a_template_file_stands_over_the_configuration(tmp_path):
    (_folder(tmp_path, "old") / "chat_template.jinja").write_text("new")
    assert ChatTemplate.load(tmp_path).render(TURNS) == "new"


def test_the_default_of_several_templates_is_taken(tmp_path):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    assert ChatTemplate.load(_folder(tmp_path, named)).render(TURNS) == "yes"


def test_a_folder_without_a_template_has_none(tmp_path):
    assert ChatTemplate.load(tmp_path) is None


def test_templates_see_special_tokens_generation_prompt_and_extra_variables(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ extra | tojson }}"
    rendered = ChatTemplate.load(_folder(tmp_path, template, bos_token="<s>", eos_token={"content": "</s>"}))
    assert rendered.render(TURNS, {"extra": '{"é": [1, "<"]}'}) == '<s></s>True{"é": [1, "<"]}'


def test_extra_variables_cannot_replace_the_conversation(tmp_path):
    rendered = ChatTemplate.load(_folder(tmp_path, "{{ messages | length }}"))
    assert rendered.render(TURNS, {"messages": "[]"}) == "2"


def test_what_a_template_raises_is_the_callers_error(tmp_path):
    rendered = ChatTemplate.load(_folder(tmp_path, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InvalidArgument, match="roles must alternate") as caught:
        rendered.render(TURNS)
    assert caught.value.field == "chat"


def test_an_extra_variable_that_is_not_json_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match="JSON") as caught:
        ChatTemplate.load(_folder(tmp_path, "x")).render(TURNS, {"thinking": "yes please"})
    assert caught.value.field == "chat.template_kwargs['thinking']"


def test_a_template_cannot_reach_python_internals(tmp_path):
    with pytest.raises(InvalidArgument, match="unsafe"):
        ChatTemplate.load(_folder(tmp_path, "{{ messages.__class__.__mro__ }}")).render(TURNS)


def test_a_template_that_does_not_compile_is_refused_by_folder(tmp_path):
    with pytest.raises(FailedPrecondition, match=str(tmp_path)):
        ChatTemplate.load(_folder(tmp_path, "{% if %}"))
