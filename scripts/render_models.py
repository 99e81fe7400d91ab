"""Renders 3D models (OBJ, MTL, textures) to RGBA pictures with a transparent background.

Needs EGL (`world_art.py --system` installs it); no screen and no GPU. The models are
Y up and look along +Z; azimuth 0 sees their front, elevation 90 their top.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

import numpy as np
import pyrender
import trimesh
from PIL import Image
from world_art import ROOT, Model, fetch, models

VIEWS = ROOT / "build" / "world" / "views"
FIELD_OF_VIEW = np.radians(24.0)
BASE_SIZE = 192  # twice a packed sprite
MAX_TEXTURE = 1024


@dataclass(frozen=True)
class View:
    """A camera and its light; angles in degrees."""

    azimuth: float
    elevation: float
    light_azimuth: float = -35.0  # of the key light, relative to the camera
    light_elevation: float = 45.0
    light_colour: tuple[float, float, float] = (1.0, 0.97, 0.92)
    fill: float = 0.45  # strength of the fill light against the key
    ambient: float = 0.36


@dataclass(frozen=True)
class Part:
    """Triangles of one material: flat arrays of corners (N, 3), normals (N, 3), uv (N, 2)."""

    corners: np.ndarray
    normals: np.ndarray
    uv: np.ndarray | None
    colour: tuple[float, float, float, float]  # sRGB and opacity
    texture: Image.Image | None
    shiny: bool

    @property
    def translucent(self) -> bool:
        return self.colour[3] < 0.95


def load_parts(model: Model) -> list[Part]:
    """The model's parts, turned as the catalogue says, centred, longest side 1."""
    scene = trimesh.load(model.path, force="scene", process=False)
    meshes = [m for m in scene.dump() if isinstance(m, trimesh.Trimesh) and len(m.faces)]
    rotation = np.array(model.rotation or np.eye(3).ravel()).reshape(3, 3)
    parts = [to_part(mesh, rotation) for mesh in meshes]
    points = np.concatenate([p.corners for p in parts])
    low, high = points.min(0), points.max(0)
    scale, centre = 1.0 / max(high - low), (low + high) / 2
    return [replace(p, corners=(p.corners - centre) * scale) for p in parts]


def to_part(mesh: trimesh.Trimesh, rotation: np.ndarray) -> Part:
    corners = mesh.vertices[mesh.faces].reshape(-1, 3) @ rotation.T
    normals = corner_normals(mesh).reshape(-1, 3) @ rotation.T
    uv = getattr(mesh.visual, "uv", None)
    uv = uv[mesh.faces].reshape(-1, 2) if uv is not None and len(uv) else None
    material = getattr(mesh.visual, "material", None)
    colour, texture, shiny = material_of(material)
    return Part(corners, normals, uv, colour, texture if uv is not None else None, shiny)


def corner_normals(mesh: trimesh.Trimesh) -> np.ndarray:
    """Normals (F, 3, 3): the vertices', or the face's where faces back to back cancel out."""
    normals = mesh.vertex_normals[mesh.faces]
    weak = np.linalg.norm(normals, axis=-1, keepdims=True) < 0.5
    return np.where(weak, mesh.face_normals[:, None], normals)


def material_of(material: object) -> tuple[tuple, Image.Image | None, bool]:
    """Colour, texture and shininess; a texture stands for the colour as a whole."""
    properties = {k.lower(): v for k, v in (getattr(material, "kwargs", None) or {}).items()}
    diffuse = np.asarray(getattr(material, "diffuse", (200, 200, 200, 255)), float) / 255
    opacity = float(np.ravel(properties.get("d", 1.0))[0])
    specular = float(np.mean(np.ravel(properties.get("ks", 0.0)).astype(float)))
    texture = getattr(material, "image", None)
    colour = (1.0, 1.0, 1.0) if texture is not None else tuple(diffuse[:3])
    # Java's reader ignores an opacity of zero; glass stays visible on any background
    opacity = 1.0 if opacity == 0 else max(opacity, 0.3)
    return (*colour, opacity), prepared(texture), specular > 0.3


def prepared(texture: Image.Image | None) -> Image.Image | None:
    if texture is None:
        return None
    texture = texture.convert("RGBA")
    texture.thumbnail((MAX_TEXTURE, MAX_TEXTURE), Image.Resampling.LANCZOS)
    return texture


def two_sided(part: Part) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Every triangle from both sides, each side with a normal that looks at its viewer."""
    triangles = part.corners.reshape(-1, 3, 3)
    normals = part.normals.reshape(-1, 3, 3)
    faces = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    away = np.einsum("fk,fk->f", faces, normals.sum(1)) < 0
    normals = np.where(away[:, None, None], -normals, normals)
    corners = np.concatenate([triangles, triangles[:, ::-1]]).reshape(-1, 3)
    normals = np.concatenate([normals, -normals[:, ::-1]]).reshape(-1, 3)
    if part.uv is None:
        return corners, normals, None
    uv = part.uv.reshape(-1, 3, 2)
    return corners, normals, np.concatenate([uv, uv[:, ::-1]]).reshape(-1, 2)


def primitive(part: Part) -> pyrender.Primitive:
    corners, normals, uv = two_sided(part)
    linear = np.array([*(np.array(part.colour[:3]) ** 2.2), part.colour[3]])
    texture = None
    cut_out = part.texture is not None and part.texture.getextrema()[3][0] < 128
    if part.texture is not None:
        texture = pyrender.Texture(source=part.texture, source_channels="RGBA")
    material = pyrender.MetallicRoughnessMaterial(
        baseColorFactor=linear,
        baseColorTexture=texture,
        metallicFactor=0.0,
        roughnessFactor=0.45 if part.shiny else 0.85,
        alphaMode="BLEND" if part.translucent else "MASK" if cut_out else "OPAQUE",
        alphaCutoff=0.4,
    )
    return pyrender.Primitive(
        positions=corners.astype(np.float32),
        normals=normals.astype(np.float32),
        texcoord_0=None if uv is None else uv.astype(np.float32),
        material=material,
    )


def look_from(azimuth: float, elevation: float) -> np.ndarray:
    """Rotation (3, 3) of a camera that looks at the origin; its columns are right, up, back."""
    a, e = np.radians([azimuth, elevation])
    back = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    return np.stack([right, np.cross(back, right), back], axis=1)


def camera_pose(points: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Pose (4, 4) from which all points just fill the square frame."""
    seen = points @ rotation
    centre = (seen.min(0) + seen.max(0)) / 2
    offset = seen - centre
    reach = np.abs(offset[:, :2]).max(1) / np.tan(FIELD_OF_VIEW / 2)
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = rotation @ (centre + np.array([0, 0, 1.04 * (reach + offset[:, 2]).max()]))
    return pose


@cache
def renderer(size: int) -> pyrender.OffscreenRenderer:
    return pyrender.OffscreenRenderer(size, size)


@dataclass(frozen=True)
class Drawable:
    """A model ready for any number of views: uploading it costs more than drawing it."""

    mesh: pyrender.Mesh
    points: np.ndarray  # (N, 3)
    translucent: bool


def load(model: Model) -> Drawable:
    parts = load_parts(model)
    return Drawable(
        mesh=pyrender.Mesh([primitive(p) for p in parts]),
        points=np.unique(np.concatenate([p.corners for p in parts]).round(3), axis=0),
        translucent=any(p.translucent for p in parts),
    )


def build_scene(drawable: Drawable, view: View) -> pyrender.Scene:
    scene = pyrender.Scene(ambient_light=np.full(3, view.ambient), bg_color=np.zeros(4))
    scene.add(drawable.mesh)
    pose = camera_pose(drawable.points, look_from(view.azimuth, view.elevation))
    scene.add(pyrender.PerspectiveCamera(FIELD_OF_VIEW, znear=0.05, zfar=50), pose=pose)
    side = view.azimuth - view.light_azimuth
    lamps = [
        (view.azimuth + view.light_azimuth, view.light_elevation, 2.1, view.light_colour),
        (side, 15.0, 2.1 * view.fill, (0.92, 0.96, 1.0)),
        (view.azimuth, 80.0, 0.5, (1.0, 1.0, 1.0)),
    ]
    for azimuth, elevation, strength, colour in lamps:
        lamp = np.eye(4)
        lamp[:3, :3] = look_from(azimuth, elevation)
        scene.add(pyrender.DirectionalLight(color=colour, intensity=strength), pose=lamp)
    return scene


def render(drawable: Drawable, view: View, size: int, supersampling: int = 1) -> Image.Image:
    """The model as RGBA, `size` pixels square, filling the frame.

    `supersampling` multiplies the four samples that every pixel has anyway.
    """
    scene = build_scene(drawable, view)
    draw = renderer(size * supersampling).render
    flags = pyrender.RenderFlags.RGBA
    pixels = draw(scene, flags=flags)[0].astype(float)
    if drawable.translucent:
        # Opacity from the difference between a black and a white background
        scene.bg_color = np.array([1.0, 1.0, 1.0, 1.0])
        white = draw(scene, flags=flags)[0].astype(float)
        pixels[..., 3] = 255 - (white[..., :3] - pixels[..., :3]).mean(-1)
    picture = Image.frombuffer(
        "RGBa", pixels.shape[1::-1], pixels.clip(0, 255).astype(np.uint8).tobytes()
    )
    return picture.resize((size, size), Image.Resampling.BOX).convert("RGBA")


def base_views(key: str) -> list[View]:
    """Seven views, seeded by the model's name: five of the front, two of the back."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    azimuths = np.array([-72, -36, 0, 36, 72, 125, -150]) + rng.uniform(-12, 12, 7)
    elevations = rng.uniform(5, 35, 7)
    return [
        View(
            azimuth=float(a),
            elevation=float(e),
            light_azimuth=float(rng.uniform(-60, 60)),
            light_elevation=float(rng.uniform(25, 65)),
            light_colour=tuple(rng.uniform((0.92, 0.88, 0.8), 1.0)),
            fill=float(rng.uniform(0.3, 0.6)),
        )
        for a, e in zip(azimuths, elevations, strict=True)
    ]


def render_base_views(model: Model) -> str | None:
    """Writes the views of one model that are not there yet; a fault is returned, not raised."""
    folder = VIEWS / model.library / model.model_id
    views = base_views(model.individual)
    if len(list(folder.glob("*.png"))) == len(views):
        return None
    try:
        drawable = load(model)
        folder.mkdir(parents=True, exist_ok=True)
        for number, view in enumerate(views):
            render(drawable, view, BASE_SIZE).save(folder / f"{number:02d}.png")
    except Exception as fault:
        return f"{model.individual}: {fault!r}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", default="", help="only models whose identifier contains this")
    arguments = parser.parse_args()
    fetch()
    chosen = [m for m in models() if arguments.only in m.individual]
    with ProcessPoolExecutor(arguments.processes) as pool:
        faults = [f for f in pool.map(render_base_views, chosen) if f]
    print("\n".join([*faults, f"{len(chosen) - len(faults)} of {len(chosen)} models rendered"]))


if __name__ == "__main__":
    main()
