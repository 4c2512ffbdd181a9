"""What a learner is asked: exercises, faulty trainings, the closing project, pains and their doctor."""
