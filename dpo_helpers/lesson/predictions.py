"""Predictions of the learner: said before a result, kept, and shown beside it."""

from __future__ import annotations

from pathlib import Path

from ..errors import CourseError
from ..settings import Settings
from ..untrusted import one_line


class Predictions:
    """`predict = Predictions(settings)`, then `predict("1.3", "about half")` as the first line above a result.

    What was said is kept in `predictions/` of the run, a line for each time that it changed, so it outlives the kernel.
    """

    def __init__(self, settings: Settings) -> None:
        self.folder: Path = settings.run_dir / "predictions"

    def __call__(self, number: str, said: object = "") -> None:
        """Keep what was said, and print it; after a change of mind the first prediction beside the last.

        number: of the notebook and of the prediction in it, "1.3". said: anything that prints; "" says nothing new.
        Raises CourseError where it cannot be kept.
        """
        path, new = self.folder / f"{number}.txt", one_line(str(said)).strip()
        try:
            kept = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
            if new and kept[-1:] != [new]:
                self.folder.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as stream:
                    stream.write(new + "\n")
                kept.append(new)
        except OSError as error:
            raise CourseError(f"{path}: the prediction cannot be kept: {error.strerror or error}") from None
        if kept:
            before = f" (first: {one_line(kept[0])})" if kept[0] != kept[-1] else ""
            print(f"You predicted: {one_line(kept[-1])}{before}")
