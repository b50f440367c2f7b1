"""A small Llama-shaped decoder that knows facts about persons, reads others, and answers quizzes."""
