"""What lies on disk between stages: JSON lines, journals, judged answers, answers made elsewhere."""
