"""What tests of several folders share: tiny models, short trainings, comparisons, processes of several ranks."""
