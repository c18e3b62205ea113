"""Templates in PromptSource's form and in plain Jinja: what they ask, and what they must not do."""

import threading

import pytest

from glm_jax.data.instructions import render
from glm_jax.data.instructions.sandbox import most_frequent
from glm_jax.data.instructions.templates import Template, read_templates
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


# Relations of three data sets: entities are texts, or lists that begin with the text.
ENTITIES = {"entities": ["Ada", "Bo", "Turin"], "entity_types": ["person", "person", "place"]}
KNOWN = {
    "allowed_relations": ["knows", "lives in"],
    "relations": [
        {"head": ["Ada", 0], "relation": "knows", "tail": ["Bo", 1]},
        {"head": ["Bo", 1], "relation": "lives in", "tail": ["Turin", 2]},
    ],
}
EVENT = {
    "roles": {"a": "agent", "b": "place"},
    "relations": [
        {"head": "Ada", "relation": "agent", "tail": "wrote"}, {"head": "Bo", "relation": "agent", "tail": "wrote"}
    ],
}  # fmt: skip
STATE = {
    "slot": "taxi: destination",
    "relations": [{"head": "[User]", "relation": "taxi: destination", "tail": "Turin"}],
}


@pytest.mark.parametrize(
    "answer, record, expected",
    [
        ('{{ format_triple(relations, allowed_relations) | join(" ") }}', KNOWN,
         "( Ada ; knows ; Bo ) ( Bo ; lives in ; Turin )"),
        ('{{ format_triple(relations, [allowed_relations[1]]) | join(" ") }}', KNOWN, "( Bo ; lives in ; Turin )"),
        ('{{ format_triple(relations, "") | join(" ") }}', EVENT, "( Ada ; agent ; wrote ) ( Bo ; agent ; wrote )"),
        ("{% for r in relations %}{% if r['head'][0] == 'Bo' %}{{ format_triple([r], '') | join(' ') }}"
         "{% endif %}{% endfor %}", KNOWN, "( Bo ; lives in ; Turin )"),
        ("{{ filter_relation(relations, slot)[0]['tail'] }}", STATE, "Turin"),
        ("{% if filter_relation(relations, 'bus').__len__() > 0 %}yes{% else %}not given{% endif %}", STATE,
         "not given"),
        ('{{ filter_type(relations, roles["a"]) | join(" ") }}', EVENT, "Ada Bo"),
        ('{{ filter_type(zip(entities, entity_types), "person") | join(" | ") }}', ENTITIES, "Ada | Bo"),
        ('{% if entity_types.__len__() > 0 %}{{ filter_type(zip(entities, entity_types), "place")[0] }}{% endif %}',
         ENTITIES, "Turin"),
    ],
)  # fmt: skip
def test_functions_of_deepstructs_templates(answer: str, record: dict[str, object], expected: str) -> None:
    assert Template("t", "Extract. ||| " + answer).render(record) == ("Extract.", expected)


def test_shuffle_depends_on_the_seed_alone_and_keeps_all() -> None:
    template = Template("t", '{{ shuffle(roles.values()) | join(", ") }} ||| {{ roles.values() | join(", ") }}')
    record = {"roles": {"a": "agent", "b": "place", "c": "time"}}
    made = [template.render(record, seed) for seed in range(60)]
    assert made == [template.render(record, seed) for seed in range(60)]
    assert {answer for _, answer in filter(None, made)} == {"agent, place, time"}
    orders = {prompt for prompt, _ in filter(None, made)}
    assert len(orders) == 6 and all(sorted(order.split(", ")) == ["agent", "place", "time"] for order in orders)


@pytest.mark.parametrize("field", ["__class__", "__init__", "__getitem__", "_x"])
def test_only_the_length_is_open_of_what_python_hides(field: str) -> None:
    with pytest.raises(UserError, match="fails"):
        Template("t", f"{{{{ names.{field}() }}}} ||| yes").render({"names": ["a"]})


def test_a_separator_in_a_record_stays_text():
    template = Template("t", "{{ rows[0].text }} ||| {{ answer_choices[0] }}", "{{ name }} ||| other")
    assert template.render({"rows": [{"text": "a ||| b"}], "name": "x ||| y"}) == ("a ||| b", "x ||| y")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("x", "['a ||| b']"),
        ("x | tojson", '["a ||| b"]'),
        ("x[0] | upper", "A ||| B"),
        ("x[0][:4]", "a ||"),
        ("x[0] | length", "7"),
        ("x[0].split() | join('-')", "a-|||-b"),
        ("x[0] ~ '|'", "a ||| b|"),
    ],
)
def test_whatever_a_template_does_with_a_record_it_finds_the_records_own_text(expression, expected):
    template = Template("t", "{{ " + expression + " }}||| {{ " + expression + " }}")
    assert template.render({"x": ["a ||| b"]}) == (expected, expected)


def test_hyphens_in_the_names_of_fields_are_underscores():
    record = {"a-b": "1", "c-d": {"e-f": "2"}, "g-h": "wrong", "g_h": "3"}
    assert Template("t", "{{ a_b }} ||| {{ c_d['e-f'] }}{{ g_h }}").render(record) == ("1", "23")


@pytest.mark.parametrize(
    ("jinja", "expected"),
    [
        ("{{ choices[-1] }}", "c"),
        ("{{ choices[-first] }}", "c"),
        ("{{ choices[:-1] | join }}", "ab"),
        ("{{ by_number[label] }}", "d"),
        ("{{ -first }}{{ 2 - 3 }}", "-1-1"),
        ("{{ choices[label] }}", "the index -1 is negative"),
        ("{{ answer_choices[label | int] }}", "the index -1 is negative"),
        ("{{ choices[first - 2] }}", "the index -1 is negative"),
        ("{{ choices[9] }}", "no element 9"),
        ("{{ none | choice }}", "fails"),
    ],
)
def test_only_a_minus_in_the_template_counts_from_the_end(jinja, expected):
    record = {"choices": ["a", "b", "c"], "label": -1, "first": 1, "by_number": {-1: "d"}, "none": []}
    template = Template("t", "ask ||| " + jinja, "yes ||| no")
    if len(expected) < 5:
        assert template.render(record) == ("ask", expected)
    else:
        with pytest.raises(UserError, match=expected):
            template.render(record)


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{ text }}", "template t gives 0 of |||"),
        ("{{ text }} ||| a ||| b", "template t gives 2 of |||"),
        ("{{ text }} ||| ", "the answer is empty"),
        ("{{ text }} ||| {{ nul }}", "a NUL character"),
        ("{{ half }} ||| a", "half a surrogate pair"),
        ("{{ mark }} ||| a", "is reserved"),
    ],
)
def test_what_is_no_prompt_with_one_answer_is_refused(jinja, message):
    record = {"text": "a", "nul": "\0", "half": "\ud800"}
    with pytest.raises(UserError, match=message.replace("|", "[|]")):
        Template("t", jinja).render(record | ({"mark": "|~|~|~|"} if "mark" in jinja else {}))


def test_a_template_with_nothing_to_ask_says_so():
    for jinja in ("{% if no %}a ||| b{% endif %}", " {% if no %}a{% endif %} ||| {% if no %}b{% endif %}"):
        assert Template("t", jinja).render({"no": 0}) is None


BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "quiet loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "repetition": "{{ 'a' * 10**10 }}",
    "power": "{{ 10**(10**9) }}",
    "padding": "{{ 'a' | center(10000000000) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "rounding": "{{ 5 | round(1000000000, 'ceil') }}",
    "doubling": "{% set a = 'aaaaaaaaaaaaaaaa' %}" + "{% set a = a ~ a %}" * 40 + "{{ a }}",
    "a growing list": "{% set a = [1] %}{% for i in range(60) %}{% set b = a.extend(a) %}{% endfor %}{{ a }}",
    "long": "{{ 'a' | center(5000000) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "parentheses": "{{" + "(" * 30_000,
    "closed parentheses": "{{" + "(" * 90 + "1" + ")" * 90 + "}}",
    "braces": "{" * 30_000,
    "negations": "{{" + "not " * 20_000 + "1}}",
    "minuses": "{{" + "-" * 20_000 + "1}}",
    "sums": "{{ 1" + "+1" * 20_000 + "}}",
    "dots": "{{ a" + ".a" * 20_000 + "}}",
    "blocks": "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "branches": "{% if 0 %}" + "{% elif 0 %}" * 8000 + "{% endif %}",
    "size": "a" * 200_000,
}


@pytest.fixture
def small_budget(monkeypatch):
    """Start a process with little time, and leave none behind."""
    render._process.close()
    monkeypatch.setattr(render, "SECONDS", 0.3)
    monkeypatch.setattr(render, "MEMORY", 200_000_000)
    yield
    render._process.close()


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_templates_have_budgets(bomb, small_budget):
    with pytest.raises(
        UserError, match="^template t .*(takes more|gives more|nested too deeply|does not parse|over 100)"
    ):
        Template("t", BOMBS[bomb] + " ||| x").render({"b": [1]})
    assert Template("t", "{{ text }} ||| x").render({"text": "still here"}) == ("still here", "x")


def test_a_bomb_takes_only_its_own_record_and_not_the_main_thread(small_budget):
    template = Template("t", "{{ 'a' * n }} ||| {{ n }}")
    sizes = [1, 10**12, 2, 3, 10**12, 4]
    found = []
    jobs = [(place, template.job({"n": size}, 0)) for place, size in enumerate(sizes)]
    thread = threading.Thread(target=lambda: found.extend(render.answers([*jobs, (6, ("as", "it is"))])))
    thread.start()
    thread.join()
    assert [place for place, _ in found] == list(range(7)) and found[6][1] == ("as", "it is")
    for size, (_, answer) in zip(sizes, found, strict=False):
        if size < 10:
            assert answer == ("a" * size, str(size))
        else:
            assert answer.reason == "over budget" and "200 MB" in answer.message


def test_a_process_ended_from_outside_loses_no_record():
    template = Template("t", "{{ n }} ||| x")
    process = render._process._process
    assert process is not None
    process.kill()
    with pytest.raises(UserError, match="ended from outside"):
        template.render({"n": 1})
    assert template.render({"n": 1}) == ("1", "x")


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
        ("templates: " + "[" * 5000, "nested too deeply"),
        ("templates: &a {x: *a}", "not a PromptSource file"),
        ("templates: {x: {name: [a], jinja: b, answer_choices: null}}", "must be text"),
        ("templates: {x: {name: a, jinja: 5:1, answer_choices: null}}\n#" + "#" * 1_000_000, "over 1,000,000 bytes"),
        (
            "a0: &a0 {x: y}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40)),
            "'templates'",
        ),
        (
            "a0: &a0 [x, x]\n"
            + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40))
            + "templates: {x: {name: *a40, jinja: b, answer_choices: null}}",
            "must be text",
        ),
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
