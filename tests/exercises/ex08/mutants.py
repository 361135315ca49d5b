"""Wrong batchers that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "shortest_decides",
        "a batch ends with its shortest request, and the others lose their last tokens",
        {"range(max(lengths[i] for i in batch))": "range(min(lengths[i] for i in batch))"},
    ),
    Mutant(
        "padding_listed",
        "requests that are done are listed until the whole batch is: they get no token, only padding",
        {"[i for i in batch if lengths[i] > step]": "list(batch)"},
    ),
    Mutant(
        "last_batch_dropped",
        "a last batch that is not full is never served",
        {"range(0, len(lengths), num_slots)": "range(0, len(lengths) - num_slots + 1, num_slots)"},
    ),
    Mutant(
        "batch_after_batch",
        "requests are let in only when all slots are free: that is static batching again",
        {
            "        while waiting and len(running) < num_slots and arrivals": "        admitting = not running\n"
            "        while admitting and waiting and len(running) < num_slots and arrivals"
        },
    ),
    Mutant(
        "one_admitted_per_step",
        "only one request is let in at each step, though more slots are free",
        {"while waiting and len(running) < num_slots": "if waiting and len(running) < num_slots"},
    ),
    Mutant(
        "arrivals_ignored",
        "requests are served before they arrive",
        {" and arrivals[waiting[0]] <= len(steps)": ""},
    ),
    Mutant(
        "a_step_late",
        "a request waits one step after its arrival",
        {"arrivals[waiting[0]] <= len(steps)": "arrivals[waiting[0]] < len(steps)"},
    ),
    Mutant(
        "slots_unlimited",
        "everybody is let in: the number of slots is not looked at",
        {"while waiting and len(running) < num_slots and": "while waiting and"},
    ),
    Mutant(
        "leaves_too_late",
        "a request stays one step after its last token",
        {"if left[request] > 0]": "if left[request] >= 0]"},
    ),
    Mutant(
        "youngest_first",
        "the youngest waiting request is let in first",
        {"running.append(waiting.popleft())\n        steps": "running.insert(0, waiting.popleft())\n        steps"},
    ),
    Mutant(
        "busy_steps_only",
        "the share is taken over the steps in which somebody was there",
        {"(len(steps) * num_slots)": "(sum(map(bool, steps)) * num_slots)"},
    ),
    Mutant(
        "mean_batch",
        "the mean number of requests in a step is given, not the share of slots",
        {"/ (len(steps) * num_slots)": "/ len(steps)"},
    ),
    Mutant(
        "slot_not_cleared",
        "a new request inherits the memory of whoever had the slot before",
        {"            self.model.clear(self.slots[request_id])\n": ""},
    ),
    Mutant(
        "prompt_forgotten",
        "only the last token of the prompt is read",
        {"self.left[request_id] = prompt, max": "self.left[request_id] = prompt[-1:], max"},
    ),
    Mutant(
        "prompt_again_and_again",
        "the prompt stays unread, and is read again at every step before the new token",
        {"self.unread[request_id] = [token]": "self.unread[request_id] = [*self.unread[request_id], token]"},
    ),
    Mutant(
        "slots_never_freed",
        "slots are not given back: when all have been used, nobody is let in any more",
        {"self.free_slots.append(self.slots.pop(request_id))": "self.slots.pop(request_id)"},
    ),
    Mutant(
        "one_token_too_many",
        "a request gets one token more than it wants",
        {"if self.left[request_id] == 0:": "if self.left[request_id] < 0:"},
    ),
    Mutant(
        "admitted_after_the_step",
        "whoever waits is let in at the end of a step, and gets the first token one step later",
        {
            "        while self.waiting and self.free_slots:": "        before = dict(self.slots)\n"
            "        while self.waiting and self.free_slots:",
            "        if not self.slots:\n            return {}\n        logits": "        joined = {r: s for r, s in "
            "self.slots.items() if r not in before}\n        self.slots = before\n        if not before:\n"
            "            self.slots = joined\n            return {}\n        logits",
            "        return new_tokens": "        self.slots |= joined\n        return new_tokens",
        },
    ),
)
