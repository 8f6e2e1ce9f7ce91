"""How fast a run is, and so how many steps a limit of time allows, and how long the rest takes."""
import math


class Pace:
    """What steps and evaluations have taken, up to `now`. All seconds are those since the run began.

    The first step, which makes kernels and touches new memory, counts only while it is alone; one that `compiles` tells
    nothing. Until an evaluation was seen, its `val_tokens` are expected to take a third of what they take in a step,
    and its answers `answer_seconds`. `earlier`: what a step took in an earlier part of the run; 0: there was none.
    """

    def __init__(self, planned_steps, max_minutes, compiles, val_tokens, answer_seconds, now, earlier=0.0):
        self.planned, self.limit, self.compiles = planned_steps, 60 * max_minutes or math.inf, compiles
        self.steps, self.trained, self.earlier, self.now, self.evaluated = 0, 0.0, earlier, now, now
        self.token_seconds, self.val_tokens = math.inf, val_tokens
        self.known_seconds = self.evaluation_seconds = answer_seconds
        self.saving_seconds = 0.0  # what is written after the last evaluation takes so long

    def step_done(self, now, tokens):
        """Takes the time at which a step of so many tokens has ended."""
        seconds, self.now = now - self.now, now
        self.trained = seconds if self.steps < 2 else self.trained + seconds
        self.steps += 1
        self.token_seconds = min(self.token_seconds, seconds / tokens)
        self.evaluation_seconds = self.known_seconds + self.val_tokens * self.token_seconds / 3

    def evaluation_done(self, now):
        """Takes the time at which an evaluation has ended: the next one takes as long, and nothing is a forecast."""
        self.known_seconds = self.evaluation_seconds = now - self.now
        self.val_tokens, self.now, self.evaluated = 0, now, now

    def step_seconds(self):
        return self.earlier if self.earlier and self.steps < 2 else self.trained / max(1, self.steps - 1)

    def time_for_steps(self):
        """The seconds before the evaluation with which the run ends, and what is saved then."""
        return self.limit - self.now - self.evaluation_seconds - self.saving_seconds

    def total_steps(self, step):
        """The number of the step at which time is up, or of the last one that is planned; at least one is made."""
        second = self.now + (0 if self.compiles else self.step_seconds())
        if self.steps < 2 and not self.earlier and second < self.limit:
            return self.planned
        steps = max(0, self.time_for_steps()) / max(1e-9, self.step_seconds())
        return int(min(self.planned, max(1, step + steps)))

    def has_time_to_evaluate(self):
        """Evaluations take a tenth of a limited time at most, and none of what the last one needs."""
        return self.limit == math.inf or (self.now - self.evaluated >= 10 * self.evaluation_seconds
                                          and self.time_for_steps() >= self.evaluation_seconds)

    def seconds_left(self, step, total_steps, interval):
        """Until the end, with the evaluations to come every `interval` steps, this step's among them."""
        evaluations = math.ceil(total_steps / interval) - (step - 1) // interval
        left = (total_steps - step) * self.step_seconds() + evaluations * self.evaluation_seconds
        return min(left, max(self.limit - self.now, self.evaluation_seconds))
