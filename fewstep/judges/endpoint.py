"""A vision-language model behind an OpenAI-compatible endpoint as judge, one picture at a time."""

import base64
import hashlib
import json
import math
import threading
from collections.abc import Mapping
from io import BytesIO
from statistics import fmean
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from fewstep.domain import Question, Verdict
from fewstep.endpoint import Endpoint, Reply, Usage
from fewstep.errors import RecipeError
from fewstep.judges.answer import Answer, Unreadable, read_answer
from fewstep.judges.rubric import AGAIN, answer_schema, messages, subscores, version
from fewstep.recipe.schema import EndpointJudge as Settings

FIELD: Final = "evaluation.judge"
TRIES: Final = 3
"""Requests for one judgement whose answers cannot be read."""
SMALL: Final = 256
"""Pictures with a shorter side below this are enlarged, pixel by pixel, by a whole factor: models
of vision refuse or blur what is smaller."""


class EndpointJudge:
    """`ask` may be called from several threads."""

    def __init__(self, settings: Settings, key: str | None, *, pause: float = 1.0) -> None:
        self.settings, self.workers = settings, settings.parallel
        self.endpoint = Endpoint(
            settings.url,
            settings.model,
            key=key,
            key_name=settings.key_env or f"{FIELD}.key_env",
            timeout=settings.timeout,
            pause=pause,
            url_field=f"{FIELD}.url",
            model_field=f"{FIELD}.model",
        )
        self.name = f"{settings.model}-rubric-{identity(settings)}"
        self.usage, self.served = Usage(), set[str]()
        """Of all requests so far, and the names that the endpoint gave the model."""
        self._lock = threading.Lock()

    def greet(self) -> None:
        """Two requests: does it answer, in the form asked for, and does it see pictures?

        A known picture must score higher for what it shows than for what it does not. RecipeError
        otherwise.
        """
        disc = known_picture()
        try:
            right, wrong = (
                self._judgement(Question("t2i", "", prompt, disc), repeat=0)
                for prompt in ("A red disc on white.", "A green forest at night, seen from above.")
            )
        except RecipeError as error:
            raise RecipeError(
                error.problem,
                field=error.field,
                hint=error.hint
                or "what it does not take can be left out: answer: text, "
                "temperature: null, seed: null",
            ) from None
        for answer in (right, wrong):
            if isinstance(answer, str):
                raise RecipeError(
                    f"what {self.settings.model} says of a known picture cannot be used: {answer}",
                    field=FIELD,
                    hint="`answer: json_object` or `answer: text` ask for it in other ways",
                )
        assert isinstance(right, Answer) and isinstance(wrong, Answer)
        if right.score <= wrong.score:
            raise RecipeError(
                f"{self.settings.model} gives a red disc {right.score:.2f} as a red disc and "
                f"{wrong.score:.2f} as a forest, so it does not see the picture",
                field=f"{FIELD}.model",
                hint="use a model that reads images",
            )

    def ask(self, question: Question) -> Verdict:
        """The mean of as many judgements as are asked for, or why there is none.

        RecipeError and EndpointDown as `Endpoint.ask` raises them.
        """
        found: list[Answer] = []
        for repeat in range(self.settings.repeats):
            answer = self._judgement(question, repeat)
            if isinstance(answer, str):
                return Verdict(None, {}, (), unscored=answer)
            found.append(answer)
        names = subscores(question.task, question.category)
        return Verdict(
            fmean(answer.score for answer in found),
            {name: fmean(answer.subscores[name] for answer in found) for name in names},
            found[0].reasons,
            judgements=tuple(answer.score for answer in found) if len(found) > 1 else (),
        )

    def _judgement(self, question: Question, repeat: int) -> Answer | str:
        """One answer, asked for again while it cannot be read; else what was wrong at last."""
        pictures = (
            [question.image] if question.source is None else [question.source, question.image]
        )
        task, category = question.task, question.category
        talk = messages(task, category, question.prompt, [data_url(image) for image in pictures])
        problem = ""
        for attempt in range(TRIES):
            more = []
            if problem:
                more = [{"role": "user", "content": AGAIN.replace("{problem}", problem)}]
            reply = self._request([*talk, *more], question, repeat * TRIES + attempt)
            try:
                if reply.problem:
                    raise Unreadable(reply.problem)
                return read_answer(reply.text, subscores(task, category))
            except Unreadable as unreadable:
                problem = str(unreadable)
            if reply.final:
                return problem
        return f"no answer that can be read: {problem}"

    def _request(self, talk: list[Any], question: Question, offset: int) -> Reply:
        fields: dict[str, Any] = dict(self.settings.request)
        if self.settings.temperature is not None:
            fields["temperature"] = self.settings.temperature
        if self.settings.seed is not None:
            fields["seed"] = self.settings.seed + offset
        if self.settings.answer == "json_object":
            fields["response_format"] = {"type": "json_object"}
        elif self.settings.answer == "json_schema":
            schema = answer_schema(question.task, question.category)
            described = {"name": "judgement", "strict": True, "schema": schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": described}
        reply = self.endpoint.ask(talk, **fields)
        with self._lock:
            self.usage = self.usage.plus(reply.usage)
            self.served |= {reply.served} if reply.served else set()
        return reply


def open_judge(settings: Settings | None, environment: Mapping[str, str]) -> EndpointJudge | None:
    """The judge of a recipe, None where it names none. Sends nothing.

    RecipeError for an address that is none and a key that is not there.
    """
    if settings is None:
        return None
    key = None
    if settings.key_env is not None and not (key := environment.get(settings.key_env)):
        raise RecipeError(
            f"the environment variable {settings.key_env} is not set",
            field=f"{FIELD}.key_env",
            hint="set it to the endpoint's key, or use key_env: null where none is needed",
        )
    return EndpointJudge(settings, key)


def identity(settings: Settings) -> str:
    """8 hex digits of the rubric and of how it is asked, `-x3` for three judgements a picture.

    Not of the address: the same model may move.
    """
    asked = {
        "rubric": version(),
        "small": SMALL,
        "answer": settings.answer,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "request": settings.request,
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    return digest if settings.repeats == 1 else f"{digest}-x{settings.repeats}"


def data_url(image: np.ndarray) -> str:
    """uint8 [h, w, 3] as PNG, without loss: JPEG hides residual noise."""
    picture = Image.fromarray(image)
    factor = math.ceil(SMALL / min(picture.size))
    if factor > 1:
        picture = picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def known_picture() -> np.ndarray:
    """A red disc on white."""
    picture = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(picture).ellipse((106, 106, 406, 406), fill=(220, 20, 30))
    return np.asarray(picture)
