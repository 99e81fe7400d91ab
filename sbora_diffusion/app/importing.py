"""A concept file that somebody else trained comes into the library."""

import shutil
from pathlib import Path

from sbora_diffusion.app.engine import Engine
from sbora_diffusion.app.workspace import Workspace
from sbora_diffusion.core.errors import ConflictError, SboraError


def bring(workspace: Workspace, engine: Engine, upload: Path) -> list[str]:
    """Keep an uploaded concept file or set, and register its concepts in their slots.

    Returns:
        Names of the concepts.

    Raises:
        SboraError: it is no concept file, belongs to another base, or its name or slot is taken;
            nothing is kept.
    """
    from sbora_diffusion.core.concept_set import read_concepts
    from sbora_diffusion.jobs import add_to_library

    try:
        concepts = [concept for concept, _ in read_concepts(upload).concepts]
    except SboraError as error:
        problem = error.problem.replace(str(upload), upload.name)
        raise type(error)(problem, error.remedy) from error
    names = [concept.meta.name for concept in concepts]
    target = workspace.concepts / f"{'-'.join(names)[:60]}.safetensors"
    if target.exists():
        raise ConflictError(f"There is a file of {names[0]!r} already", "delete the concept first")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(upload, target)
    try:
        with engine.pipeline(workspace.base.reference) as pipeline:
            add_to_library(target, concepts, pipeline.base, workspace.library)
    except BaseException:
        target.unlink()
        raise
    return names
