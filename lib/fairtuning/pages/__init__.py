"""What the book shows: ``tables``, ``figures``, and the pages made of records: ``records``, ``scoreboard``,
``comparison``."""
