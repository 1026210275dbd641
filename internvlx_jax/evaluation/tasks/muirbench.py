"""MuirBench: multiple choice on several images, which the question may name where they belong.

VLMEvalKit's prompt and metric. All images stand in front; an `<image>` of the question becomes the
name of its image, unless all of them stand together.
"""

import dataclasses

from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.evaluation.cot import boxed_choice
from internvlx_jax.evaluation.prompts import Prompt, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import vanilla_choice
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit


def named_images(prompt: Prompt) -> Prompt:
    """Returns a prompt whose placeholders are names, behind a list of all images."""

    def with_names(question: Question) -> str:
        count = len(question.images)
        text = prompt(question).replace(" ".join([IMAGE_PLACEHOLDER] * count), "")
        for i in range(1, count + 1):
            text = text.replace(IMAGE_PLACEHOLDER, f"<Image-{i}>", 1)
        listed = "".join(f"Image-{i}: {IMAGE_PLACEHOLDER}\n" for i in range(1, count + 1))
        return listed + text

    return with_names


_SPEC = vlmevalkit(
    tsv("MUIRBench", needs=("answer", "A", "B")), vlm_choice, vanilla_choice, dataset="MUIRBench"
)

TASKS = (
    Task(
        name="muirbench",
        title="MuirBench",
        samples=2600,
        protocols={
            "vlmevalkit": dataclasses.replace(
                _SPEC,
                prompt=named_images(vlm_choice),
                cot=dataclasses.replace(
                    boxed_choice(vlm_choice), prompt=named_images(boxed_choice(vlm_choice).prompt)
                ),
            )
        },
    ),
)
