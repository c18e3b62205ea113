"""The data sets of GLM-130B's multi-task instruction training, and how many samples of each were taken.

Sources: table 12 and appendix C of the paper (arXiv 2210.02414), and the list released with the code
(resources/multitask_list.txt of zai-org/GLM-130B). This is their union: 76 data sets, the 74 of the paper's table and
two that only the released list has. ACE2005, CoNLL04 and NYT29 stand in the table twice, once for their entities and
once for their relations. Training saw about 36% of each set's samples.
"""

from __future__ import annotations

from dataclasses import dataclass

UNDERSTANDING_CAP = 100_000  # prompted samples of a set for understanding or generation, at most
EXTRACTION_CAP = 200_000  # the same for information extraction
LARGE_CAP = 500_000  # the same for KELM and PropBank
LARGE = ("kelm", "propbank")
ONLY_RELEASED = ("tydiqa", "ade")  # in the released list, not in the paper's table
# In the paper's table, not in the released list.
ONLY_PAPER = ("super_glue/cb", "anli", "kelm", "conll04/entities", "nyt29/entities", "ace2005/entities")

PROMPTSOURCE = {  # prompts: PromptSource's templates
    "coreference": "super_glue/wsc.fixed winogrande/winogrande_xl",
    "natural language inference": "super_glue/rte super_glue/cb anli",
    "paraphrase identification": "glue/mrpc glue/qqp paws/labeled_final",
    "closed-book QA": "ai2_arc/ARC_Challenge ai2_arc/ARC_Easy kilt_tasks/hotpot_qa trivia_qa/unfiltered web_questions "
    "wiki_qa",
    "extractive QA": "adversarial_qa/dbidaf adversarial_qa/dbert adversarial_qa/droberta duorc/SelfRC "
    "duorc/ParaphraseRC ropes squad_v2 super_glue/record quoref tydiqa",
    "multiple-choice QA": "cos_e/v1.11 cosmos_qa dream openbookqa/main qasc quail quarel quartz race/high race/middle "
    "sciq social_i_qa super_glue/boolq super_glue/multirc wiki_hop/original wiqa piqa",
    "sentiment": "amazon_polarity app_reviews imdb rotten_tomatoes yelp_review_full",
    "sentence completion": "super_glue/copa hellaswag",
    "structure to text": "common_gen wiki_bio",
    "summarisation": "cnndailymail/3.0.0 gigaword multi_news samsum xsum",
    "topic classification": "ag_news dbpedia_14 trec",
    "word sense disambiguation": "super_glue/wic",
}
DEEPSTRUCT = {  # prompts: templates written by hand, in appendix C.2 of the paper
    "relation classification": "tacred",
    "joint entity relation extraction": "conll04 nyt29 ace2005 ade kelm",
    "named entity recognition": "conll03 ontonotes genia conll04/entities nyt29/entities ace2005/entities",
    "semantic role labeling": "conll05 conll12 propbank",
    "event extraction": "ace05",
    "dialogue state tracking": "multi_woz_2.1",
}
# PromptSource's folders where their names differ; for TyDi QA, the task with a passage.
FOLDERS = {
    "ai2_arc/ARC_Challenge": "ai2_arc/ARC-Challenge",
    "ai2_arc/ARC_Easy": "ai2_arc/ARC-Easy",
    "kilt_tasks/hotpot_qa": "kilt_tasks/hotpotqa",
    "cnndailymail/3.0.0": "cnn_dailymail/3.0.0",
    "tydiqa": "tydiqa/secondary_task",
}


@dataclass(frozen=True)
class Dataset:
    """One data set.

    Attributes:
        name: as in the released list; "/" before a subset or a second task.
        task: what it teaches.
        prompts: "promptsource" or "deepstruct".
        cap: the most prompted samples taken from it.
        listed: which lists name it: "both", "released list" or "paper".
    """

    name: str
    task: str
    prompts: str
    cap: int
    listed: str

    @property
    def folder(self) -> str:
        """The folder of its templates below PromptSource's promptsource/templates."""
        return FOLDERS.get(self.name, self.name)


def _datasets() -> dict[str, Dataset]:
    found = {}
    for prompts, tasks, cap in (
        ("promptsource", PROMPTSOURCE, UNDERSTANDING_CAP),
        ("deepstruct", DEEPSTRUCT, EXTRACTION_CAP),
    ):
        for task, names in tasks.items():
            for name in names.split():
                listed = "released list" if name in ONLY_RELEASED else "paper" if name in ONLY_PAPER else "both"
                found[name] = Dataset(name, task, prompts, LARGE_CAP if name in LARGE else cap, listed)
    return found


DATASETS = _datasets()
