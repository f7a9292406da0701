"""Published ways to answer questions with a language model that was not trained to search, each one file that reads top to bottom."""
