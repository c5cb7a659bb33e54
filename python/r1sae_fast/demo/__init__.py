"""The whole chain on TinyR1: from its reasoning to features, shown as they are found."""

from r1sae_fast.demo.chain import run_demo
from r1sae_fast.demo.settings import SCALES, DemoSettings

__all__ = ["SCALES", "DemoSettings", "run_demo"]
