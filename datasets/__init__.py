"""Readers, one per data set, and the transforms of the pretraining pairs."""

from datasets.modelnet import DemoShapes, ModelNet10, ModelNet40
from datasets.s3dis import S3DIS, S3DISRooms
from datasets.scanobjectnn import ScanObjectNN
from datasets.shapenet_part import PartTaxonomy, ShapeNetPart
from datasets.shapenet_render import ShapeNetRender

__all__ = [
    "S3DIS",
    "DemoShapes",
    "ModelNet10",
    "ModelNet40",
    "PartTaxonomy",
    "S3DISRooms",
    "ScanObjectNN",
    "ShapeNetPart",
    "ShapeNetRender",
]
