"""Templates in PromptSource's form and in plain Jinja: what they ask, and what they must not do."""

import pytest

from glm_jax.data.instructions.templates import Template, most_frequent, read_templates
from glm_jax.errors import UserError

PROMPTSOURCE = """
dataset: reviews
templates:
  1f2e: !Template
    answer_choices: bad ||| good
    id: 1f2e
    jinja: '{{ text }} Is it {{ answer_choices | join(" or ") }}? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      metrics:
      - Accuracy
      original_task: true
    name: ask
    reference: ''
  9a8b: !Template
    answer_choices: null
    id: 9a8b
    jinja: "{% if label == 1 %}Write praise. ||| {{ text }}{% endif %}"
    metadata: !TemplateMetadata {}
    name: write
    reference: ''
"""


def test_promptsource_files_are_read_directly(tmp_path):
    (tmp_path / "templates.yaml").write_text(PROMPTSOURCE)
    for path in (tmp_path, tmp_path / "templates.yaml"):
        ask, write = read_templates(path)
        assert ask.render({"text": "Fine.", "label": 1}) == ("Fine. Is it bad or good?", "good")
        assert write.render({"text": "Fine.", "label": 1}) == ("Write praise.", "Fine.")
        assert write.render({"text": "Poor.", "label": 0}) is None


def test_deepstruct_templates_split_input_and_target(tmp_path):
    """The form of the paper's appendix C.2: a task, a text, and tuples as the answer."""
    (tmp_path / "entities.jinja").write_text(
        "Find the entities. {{ text }} ||| "
        "{% for part in entities %}( {{ part.name }} ; instance of ; {{ part.type }} ) {% endfor %}"
    )
    (template,) = read_templates(tmp_path)
    record = {"text": "Ada met Bo.", "entities": [{"name": "Ada", "type": "person"}, {"name": "Bo", "type": "person"}]}
    assert template.render(record) == (
        "Find the entities. Ada met Bo.", "( Ada ; instance of ; person ) ( Bo ; instance of ; person )"
    )  # fmt: skip


def test_a_separator_in_a_record_stays_text():
    template = Template("t", "{{ rows[0].text }} ||| {{ answer_choices[0] }}", "{{ name }} ||| other")
    assert template.render({"rows": [{"text": "a ||| b"}], "name": "x ||| y"}) == ("a ||| b", "x ||| y")


def test_choices_depend_on_the_seed_alone():
    template = Template("t", "{{ names | choice }} {{ names | random }} ||| yes")
    names = {"names": [f"n{i}" for i in range(50)]}
    assert template.render(names, 3) == template.render(names, 3)
    assert len({template.render(names, seed) for seed in range(10)}) > 5


def test_filters_and_functions_that_templates_use():
    template = Template("t", "{% for a, b in zip(x, y) %}{{ a }}{{ b }} {% endfor %}||| {{ most_frequent_of(x) }}")
    with pytest.raises(UserError, match="most_frequent_of"):
        template.render({"x": [1], "y": [2]})
    template = Template("t", "{% for a, b in zip(x, y) %}{{ a }}{{ b }} {% endfor %}||| {{ x | most_frequent }}")
    assert template.render({"x": [1, 1, 2, 2, 3], "y": [4, 5]}) == ("14 15", "[1, 2]")
    assert most_frequent([]) == []


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{ ''.__class__.__mro__ }} ||| x", "fails"),
        ("{{ missing }} ||| x", "fails .'missing' is undefined.: its records have text"),
        ("{{ text.nothing.more }} ||| x", "fails"),
        ("{{ text / 0 }} ||| x", "fails"),
        ("{{ text ||| x", "does not parse"),
        ("{% include 'other' %} ||| x", "fails"),
    ],
)
def test_templates_that_are_wrong_or_reach_too_far_are_refused(jinja, message):
    with pytest.raises(UserError, match=message):
        Template("t", jinja).render({"text": "a"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("templates: [", "not a PromptSource file"),
        ("other: 1", "not a PromptSource file"),
        ("templates:\n  a: !!python/object/apply:os.getcwd []", "not a PromptSource file"),
        ("templates: {}", "holds no templates"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    (tmp_path / "templates.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_templates(tmp_path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no templates"):
        read_templates(tmp_path)
    with pytest.raises(UserError, match="cannot read the templates"):
        read_templates(tmp_path / "none.jinja")
