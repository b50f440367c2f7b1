"""The classes that a trainer can be."""

import pytest

from mechdsl.program.trainers import TRAINER_KINDS, TRAINERS, Trainer, VectorTrainer, trainer


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_trainer_without_a_method_of_its_kind_names_the_method(kind: type[Trainer]) -> None:
    lacking = type("Lacking", (kind,), {"example": "lacking(features: 8)"})
    with pytest.raises(TypeError, match=r"trainer `lacking`: it needs `\w+\(self, .*opti"):
        trainer("lacking")(lacking)
    assert "lacking" not in TRAINERS


def test_trainer_of_no_kind_names_the_kinds() -> None:
    lacking = type("Lacking", (Trainer,), {"example": "lacking(features: 8)"})
    with pytest.raises(TypeError, match="a subclass of `IterativeTrainer`, `SolvedTrainer`"):
        trainer("lacking")(lacking)


def test_vector_without_start_names_its_arguments() -> None:
    lacking = type("Lacking", (VectorTrainer,), {"example": "lacking"})
    with pytest.raises(TypeError, match=r"it needs `start\(self, like, options, random\)`"):
        trainer("lacking")(lacking)
