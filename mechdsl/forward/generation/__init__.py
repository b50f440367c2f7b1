"""Text generated after prompts while rules act."""
