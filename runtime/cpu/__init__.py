"""The CPU back end: plans and states executed with torch, tile by tile."""
