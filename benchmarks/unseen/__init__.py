"""Ask how often twice the starts lower a best-of-K bound by more than it said."""
