"""The base classes of trainers."""

import pytest

from mechdsl.program.trainers import TRAINER_KINDS, TRAINERS, Trainer, VectorTrainer, trainer


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_trainer_without_a_required_method_names_it(kind: type[Trainer]) -> None:
    lacking = type("Lacking", (kind,), {"example": "lacking(features: 8)"})
    with pytest.raises(TypeError, match=r"trainer `lacking`: it needs `\w+\(self, .*opti"):
        trainer("lacking")(lacking)
    assert "lacking" not in TRAINERS


def test_trainer_without_a_known_base_class_names_the_base_classes() -> None:
    lacking = type("Lacking", (Trainer,), {"example": "lacking(features: 8)"})
    with pytest.raises(TypeError, match="a subclass of `IterativeTrainer`, `SolvedTrainer`"):
        trainer("lacking")(lacking)


def test_vector_trainer_without_start_names_its_arguments() -> None:
    lacking = type("Lacking", (VectorTrainer,), {"example": "lacking"})
    with pytest.raises(TypeError, match=r"it needs `start\(self, like, options, random\)`"):
        trainer("lacking")(lacking)
