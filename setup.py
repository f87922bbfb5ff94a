"""Metadata is in pyproject.toml. This file must not need torch: it runs before torch is there."""

from setuptools import setup

setup()
