"""Draw segmentations: a sheet (input, truth, prediction, errors) and colored PLY files, for parts or rooms.

The task follows from the checkpoint. For parts, draw test shapes of different categories; for rooms, whole rooms of an
area, without their ceilings on the sheet (the PLY files keep them).

Examples:
  python downstream/segmentation/visualize.py --model_path checkpoints/part/best.pth --output_dir runs/parts
  python downstream/segmentation/visualize.py --model_path checkpoints/part/best.pth --class_test chair lamp --items 6
  python downstream/segmentation/visualize.py --model_path checkpoints/area5/best.pth --test_area 5 --items 2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also run by path

import numpy as np

from datasets.s3dis import AREAS, CLASS_COLORS, CLASS_NAMES, S3DISRooms
from datasets.shapenet_part import ShapeNetPart
from downstream.features import check_neighbors
from downstream.figures import check_output_path
from downstream.finetuning import inference_settings, scores_of, warn_of_other_points
from downstream.segmentation.drawing import Item, colored, draw_sheet, write_colored_ply
from downstream.segmentation.main_partseg import Parts, check_fits, points_of, predict_parts
from downstream.segmentation.main_semseg import predict_room
from engine.device import resolve_device
from engine.load_model import fine_tuned_from_checkpoint, kind_of_checkpoint
from models import ENCODER_ALIASES, ENCODERS
from models.task_heads import FineTuned, PartSegmentation, SemanticSegmentation
from utils.cli import CommonSettings, flag, log_to_screen, positive_int, run, workers_flag, write_json
from utils.errors import CheckpointError, UserError

FOREIGN_COLOR, FOREIGN_NAME = (0.0, 0.0, 0.0), "part of another category"


@dataclass(kw_only=True)
class PictureConfig(CommonSettings):
    """Settings of this script."""

    workers: int = workers_flag()
    model_path: str = flag(
        group="model", required=True, metavar="FILE", help="fine-tuned checkpoint, or published weights"
    )
    task: str | None = flag(choices=("parts", "rooms"), help="what to draw (default: by the checkpoint's head)")
    model: str | None = flag(
        choices=[*ENCODERS, *ENCODER_ALIASES], help="encoder of published weights (default: recognized by the tensors)"
    )
    k: int | None = flag(type=positive_int, help="neighbors per point (default: the checkpoint's)")
    test_batch_size: int = flag(8, type=positive_int, metavar="B", help="samples per forward pass")
    items: int = flag(
        6, group="what to draw", type=positive_int, metavar="N", help="shapes or rooms, unless --rooms names them"
    )
    class_test: list[str] | None = flag(nargs="+", metavar="NAME", help="parts: categories to draw (default: all)")
    num_points: int | None = flag(type=positive_int, metavar="N", help="parts: points per shape (default: all)")
    test_area: int = flag(5, type=int, choices=AREAS, help="rooms: area to draw")
    rooms: list[str] | None = flag(nargs="+", metavar="ROOM", help="rooms: names, such as Area_5_office_1")
    output_dir: str = flag("runs/pictures", metavar="DIR", help="folder for sheet.png and the PLY files")


def part_items(config: PictureConfig, model: FineTuned, payload: dict[str, Any]) -> tuple[list[Item], ShapeNetPart]:
    """Return shapes of the test split with their predicted parts, sorted by category.

    Raises:
        CheckpointError: the model has other categories or parts than the data.
        UserError: the category is unknown.
    """
    choice = payload.get("table", {}).get("class_choice")
    shapes = ShapeNetPart(config.data_root, "test", num_points=config.num_points, class_choice=choice)
    parts = Parts(shapes)
    check_fits(config.model_path, model, payload, parts)
    check_neighbors(model.encoder, points_of(parts), name=config.model_path)
    warn_of_other_points(config.model_path, payload, points_of(parts))
    taxonomy, categories = shapes.taxonomy, np.unique(shapes.categories)
    if config.class_test:
        categories = np.intersect1d(categories, [taxonomy.category_number(name) for name in config.class_test])
        if not len(categories):
            raise UserError(
                f"--class_test {' '.join(config.class_test)}: the test shapes have none of these categories"
            )
    rounds = [np.flatnonzero(shapes.categories == category) for category in categories]
    if len(rounds) > config.items:
        rounds = [rounds[i] for i in np.linspace(0, len(rounds) - 1, config.items).round().astype(int)]
    order = [rows[i] for i in range(max(map(len, rounds))) for rows in rounds if i < len(rows)]
    chosen = np.sort(np.array(order[: config.items]))
    chosen = chosen[np.argsort(shapes.categories[chosen], kind="stable")]
    predicted = predict_parts(model, parts, chosen=chosen, **inference_settings(config))
    items = []
    for row, guess in zip(chosen, predicted, strict=True):
        name = f"{taxonomy.category_names[shapes.categories[row]]} {row}"
        hidden = np.zeros(len(guess), dtype=bool)
        # Only colors within a category are distinct, so all parts of other categories share one extra color.
        own = taxonomy.parts_of(int(shapes.categories[row]))
        guess = np.where((guess >= own.start) & (guess < own.stop), guess, taxonomy.num_parts)
        items.append(Item(name, shapes.points[row], None, shapes.parts[row], guess, hidden))
    return items, shapes


def room_items(config: PictureConfig, model: FineTuned) -> list[Item]:
    """Return whole rooms with the predicted class of every point.

    Raises:
        DataError: the room-wise blocks are missing or wrong, or the area has no rooms.
        UserError: the room is unknown.
    """
    rooms = S3DISRooms(config.data_root, config.test_area, in_channels=model.encoder.in_channels)
    check_neighbors(model.encoder, rooms.block_points, name=config.model_path)
    for name in config.rooms or []:
        if name not in rooms.rooms:
            raise UserError(f"no room {name} in area {config.test_area}; it has {', '.join(rooms.rooms)}")
    items = []
    for name in config.rooms or rooms.rooms[: config.items]:
        room = rooms.rooms.index(name)
        passes = scores_of(model, rooms, chosen=rooms.blocks_of(room), **inference_settings(config))
        predicted = predict_room(passes, rooms.room_size(room), name).predicted
        points, truth = rooms.room_cloud(room)
        hidden = truth == CLASS_NAMES.index("ceiling")
        items.append(Item(name, points[:, :3], points[:, 3:], truth, predicted, hidden))
    return items


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Draw, and return the files written and the share of correctly predicted points.

    Raises:
        UserError: a setting, file or checkpoint is wrong.
    """
    config = PictureConfig.from_flags(PictureConfig.parser().parse_args(argv))
    log_to_screen()
    folder = Path(config.output_dir)
    for path in filter(None, (folder / "sheet.png", config.json)):
        check_output_path(path)
    tasks = {"parts": PartSegmentation, "rooms": SemanticSegmentation}
    name = config.task
    if name is None:
        kind = kind_of_checkpoint(config.model_path, model=config.model)
        name = next((n for n, task in tasks.items() if task.kind == kind), None)
        if name is None:
            what = f"a model of {kind}" if kind else "an encoder without a head"
            raise CheckpointError(f"{config.model_path} is not a model of parts or rooms: it is {what}")
    model, payload = fine_tuned_from_checkpoint(config.model_path, tasks[name], model=config.model, k=config.k)
    model.to(resolve_device(config.device))
    if name == "parts":
        items, shapes = part_items(config, model, payload)
        table = np.concatenate([shapes.taxonomy.colors, [FOREIGN_COLOR]])
        names, up = (*shapes.taxonomy.part_names, FOREIGN_NAME), "y"
        title = "parts of test shapes"
    else:
        items = room_items(config, model)
        table, names, up = CLASS_COLORS, CLASS_NAMES, "z"
        title = f"rooms of area {config.test_area}, drawn without ceiling"
    draw_sheet(items, table, names, folder / "sheet.png", up=up, title=title)
    files = [str(folder / "sheet.png")]
    for item in items:
        for column, colors in colored(item, table).items():
            path = folder / f"{item.name.replace(' ', '_')}_{column}.ply"
            write_colored_ply(path, item.points, colors)
            files.append(str(path))
    right = {item.name: 100 * float(np.mean(item.truth == item.predicted)) for item in items}
    print(f"{len(items)} clouds drawn: {files[0]} and {len(files) - 1} PLY files in {folder}")
    metrics = {"task": name, "files": files, "accuracy": right}
    write_json(config.json, metrics)
    return metrics


if __name__ == "__main__":
    run(main)
