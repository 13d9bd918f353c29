"""Coding: small Python programs to write, read, repair and explain; every program that stands as an answer runs."""

from __future__ import annotations

import random

from .made import Kinds, Made, pick
from .programs import FORMULAS, PROGRAMS

CONCEPTS = {
    "list": "an ordered collection of values that can change",
    "tuple": "an ordered collection of values that cannot change",
    "dictionary": "a mapping from keys to values",
    "set": "a collection of different values without an order",
    "string": "a piece of text between quotation marks",
    "loop": "a part of a program that runs several times",
    "function": "a named part of a program that takes arguments and returns a value",
    "variable": "a name for a value",
    "comment": "a note in the code that the computer ignores",
    "module": "a file of code that other programs can import",
    "class": "a plan for objects with data and methods",
    "boolean": "a value that is either True or False",
    "recursion": "a function calling itself on a smaller problem",
    "bug": "a mistake in a program",
    "argument": "a value handed to a function when it is called",
    "integer": "a whole number",
}
ERRORS = {
    "NameError": "a name is used that was never defined",
    "IndexError": "a position outside the list is asked for",
    "KeyError": "a dictionary does not hold the key",
    "ZeroDivisionError": "a number is divided by zero",
    "TypeError": "an operation gets a value of the wrong type",
    "ValueError": "a function gets a value that it cannot use",
    "SyntaxError": "the code does not follow the grammar of Python",
    "IndentationError": "the lines are not indented as Python needs",
    "FileNotFoundError": "a file is opened that does not exist",
    "ImportError": "a module cannot be imported",
}
SUFFIXES = ("", "_of", "_in", "_from", "_all", "_quick", "_safe", "_simple")
ARGUMENTS = {
    "values": ("values", "numbers", "items", "data", "xs"),
    "text": ("text", "word", "line", "s", "message"),
    "n": ("n", "number", "k", "value", "x"),
}


def program(rng: random.Random) -> Made:
    task, stem, kind, body, check = rng.choice(PROGRAMS)
    number = rng.randrange(2, 12)
    name = stem + rng.choice(SUFFIXES)
    argument = rng.choice(ARGUMENTS[kind])
    task = task.format(N=number)
    code = f"def {name}({argument}):\n" + "\n".join(f"    {line}" for line in body)
    code = code.replace("ARG", argument).replace("NUM", str(number))
    question = pick(
        rng,
        f"Write a Python function {name}({argument}) that {task}.",
        f"Define a function {name} in Python which {task}.",
        f"Please code a Python function called {name} that {task}.",
        f"In Python, implement {name}({argument}). It {task}.",
        f"I need a short Python function, {name}, that {task}.",
    )
    return Made(instruction=question, output=code, check=check.replace("FUN", name).replace("NUM", str(number)))


def formula(rng: random.Random) -> Made:
    """Between coding and mathematics: a formula as a function."""
    task, stem, arguments, expression, check = rng.choice(FORMULAS)
    name = stem + rng.choice(SUFFIXES)
    question = pick(
        rng,
        f"Write a Python function {name}({arguments}) that calculates {task}.",
        f"Turn this into Python code: {name} computes {task}.",
        f"How do you calculate {task} in Python? Write {name}({arguments}).",
    )
    return Made(
        instruction=question,
        output=f"def {name}({arguments}):\n    return {expression}",
        check=check.replace("FUN", name),
    )


def reading(rng: random.Random) -> Made:
    """Between coding, mathematics and reasoning: what a program prints."""
    x, y, n = rng.randrange(2, 30), rng.randrange(2, 9), rng.randrange(3, 8)
    values = [rng.randrange(0, 20) for _ in range(rng.randrange(3, 6))]
    word = rng.choice(
        ["garden", "window", "silver", "planet", "rocket", "button", "stream", "letter", "bottle", "summer"]
    )
    text, printed = rng.choice(
        [
            (f"x = {x}\ny = {y}\nprint(x + y * 2)", x + y * 2),
            (f"x = {x}\nx = x * {y}\nprint(x - {n})", x * y - n),
            (f"total = 0\nfor i in range({n}):\n    total = total + i\nprint(total)", sum(range(n))),
            (f"values = {values}\nprint(max(values))", max(values)),
            (f"values = {values}\nprint(len(values))", len(values)),
            (f"values = {values}\nprint(sorted(values))", sorted(values)),
            (f"values = {values}\nprint(sum(values))", sum(values)),
            (f'word = "{word}"\nprint(word[{y - 2 if y < 7 else 0}])', word[y - 2 if y < 7 else 0]),
            (f'word = "{word}"\nprint(len(word) * {y})', len(word) * y),
            (f'word = "{word}"\nprint(word.upper())', word.upper()),
            (f'word = "{word}"\nprint(word[::-1])', word[::-1]),
            (f"x = {x}\nif x > {2 * y}:\n    print('big')\nelse:\n    print('small')", "big" if x > 2 * y else "small"),
            (f"print({x} % {y}, {x} // {y})", f"{x % y} {x // y}"),
            (f"n = {x}\nwhile n > {y}:\n    n = n - {y}\nprint(n)", x if x <= y else (x - 1) % y + 1),
        ]
    )
    question = pick(
        rng,
        "What does this program print?",
        "Read the code and give its output.",
        "Which output do these lines produce?",
        "Run this Python code in your head. What is printed?",
    )
    return Made(instruction=question, input=text, output=str(printed))


def repair(rng: random.Random) -> Made:
    task, stem, kind, body, check = rng.choice([entry for entry in PROGRAMS if "return" in entry[3][-1]])
    number, argument = rng.randrange(2, 12), rng.choice(ARGUMENTS[kind])
    name = stem + rng.choice(SUFFIXES)
    code = f"def {name}({argument}):\n" + "\n".join(f"    {line}" for line in body)
    code = code.replace("ARG", argument).replace("NUM", str(number))
    broken, what = rng.choice(
        [
            (code.replace("):\n", ")\n", 1), "a colon is missing after the argument list"),
            (code.replace("def ", "function ", 1), "Python functions start with def"),
            (code.replace("    return", "    retrun"), "return is misspelt"),
            (code.replace(f"({argument}):", "():", 1), "the function has no argument"),
        ]
    )
    question = pick(
        rng,
        f"This function should be one that {task.format(N=number)}, but it has a mistake. Correct it.",
        "Find the error in this Python code and fix it.",
        "Repair this function so that it runs.",
        "Why does this code fail? Give the corrected version.",
    )
    return Made(
        instruction=question,
        input=broken,
        output=f"# {what}\n{code}",
        check=check.replace("FUN", name).replace("NUM", str(number)),
    )


def explain(rng: random.Random) -> Made:
    number, name = rng.randrange(2, 20), pick(rng, "values", "numbers", "words", "items", "names", "data")
    text, said = rng.choice(
        [
            (f"{name}.append({number})", f"It adds {number} to the end of the list {name}."),
            (f"{name}.sort()", f"It sorts the list {name} in place."),
            (f"first = {name}[0]", f"It stores the first element of {name} in first."),
            (f"last = {name}[-1]", f"It stores the last element of {name} in last."),
            (f"for item in {name}:\n    print(item)", f"It prints every element of {name} on its own line."),
            (f"size = len({name})", f"It stores the number of elements of {name} in size."),
            (f"{name} = {name}[:{number}]", f"It keeps only the first {number} elements of {name}."),
            (f"{name} = [x * {number} for x in {name}]", f"It multiplies every element of {name} by {number}."),
            (f"{name} = [x for x in {name} if x > {number}]", f"It keeps the elements of {name} that are greater than {number}."),
            (f"total = sum({name}) + {number}", f"It adds up {name}, adds {number} and stores the result in total."),
            (f"if {number} in {name}:\n    print('yes')", f"It prints yes when {number} is an element of {name}."),
            (f"{name} = sorted({name}, reverse=True)[:{number}]", f"It keeps the {number} largest elements of {name}, largest first."),
            (f"{name}.pop()", f"It removes the last element of {name}."),
            (f"unique = set({name})", f"It stores the different elements of {name} in a set called unique."),
        ]
    )  # fmt: skip
    question = pick(
        rng,
        "Explain what this Python code does.",
        "What is the effect of this code?",
        "Describe these lines of Python in one sentence.",
        "A beginner asks what this code means. Answer briefly.",
    )
    return Made(instruction=question, input=text, output=said)


def rewrite(rng: random.Random) -> Made:
    number, source = rng.randrange(2, 20), pick(rng, "values", "numbers", "items", "data")
    target = pick(rng, "result", "out", "chosen", "done")
    expression, condition = rng.choice(
        [
            (f"x * {number}", ""),
            (f"x + {number}", ""),
            ("x", f"x > {number}"),
            ("x", f"x % {number} == 0"),
            (f"x - {number}", f"x >= {number}"),
            ("x * x", f"x < {number}"),
        ]
    )
    inner = (
        f"    if {condition}:\n        {target}.append({expression})"
        if condition
        else f"    {target}.append({expression})"
    )
    loop = f"{target} = []\nfor x in {source}:\n{inner}"
    short = f"{target} = [{expression} for x in {source}{f' if {condition}' if condition else ''}]"
    to_short = rng.random() < 0.6
    question = (
        pick(
            rng,
            "Rewrite this loop as a list comprehension.",
            "Make this code shorter with a list comprehension.",
            "Turn the loop into one line of Python.",
        )
        if to_short
        else pick(rng, "Rewrite this list comprehension as a loop.", "Write this line of Python as an ordinary loop.")
    )
    given, said = (loop, short) if to_short else (short, loop)
    check = f"{source} = list(range(60))\nexec({given!r})\nexpected = list({target})\nexec(ANSWER)\nassert {target} == expected"
    return Made(instruction=question, input=given, output=said, check=check)


def concept(rng: random.Random) -> Made:
    """Between coding and knowledge: what a word of programming means."""
    if rng.random() < 0.6:
        word, meaning = rng.choice(list(CONCEPTS.items()))
        question = pick(
            rng,
            f"What is a {word} in programming?".replace("a i", "an i").replace("a a", "an a"),
            f"Explain the word {word} to someone who learns to program.",
            f"What do programmers call a {word}?".replace("a i", "an i").replace("a a", "an a"),
        )
        return Made(instruction=question, output=pick(rng, f"{meaning[0].upper()}{meaning[1:]}.", f"It is {meaning}."))
    word, meaning = rng.choice(list(ERRORS.items()))
    question = pick(
        rng,
        f"When does Python raise a {word}?",
        f"What does a {word} mean in Python?",
        f"My script stops with {word}. What is the usual reason?",
    )
    return Made(instruction=question, output=pick(rng, f"When {meaning}.", f"It means that {meaning}."))


def algorithm(rng: random.Random) -> Made:
    """Between coding and reasoning: the steps of a method in words."""
    what, steps = rng.choice(
        [
            ("find the largest number in a list", "Take the first number as the largest so far. Look at every other number; when it is larger, it becomes the largest so far."),
            ("check whether a word is a palindrome", "Compare the first letter with the last, the second with the last but one, and so on. If all pairs are equal it is a palindrome."),
            ("search a sorted list", "Look at the middle element. If it is too large go on in the left half, if it is too small in the right half, until it is found."),
            ("sort a hand of cards", "Take the cards one by one and put each into its place among those that are sorted already."),
            ("count how often each word occurs", "Keep a dictionary. For each word add one to its entry, starting at zero."),
            ("remove duplicates but keep the order", "Keep a set of what was seen. Copy an element only when it is not in the set yet, and then add it."),
            ("swap two variables", "Store the first value under a third name, give the first variable the second value, then give the second variable the stored value."),
            ("find the greatest common divisor", "Replace the pair by the smaller number and the remainder of the division until the remainder is zero."),
            ("reverse a list", "Swap the first element with the last, the second with the last but one, and stop in the middle."),
            ("add up the digits of a number", "Take the last digit by the remainder of division by ten, add it to the sum, divide by ten, and repeat until nothing is left."),
        ]
    )  # fmt: skip
    question = pick(
        rng,
        f"Describe an algorithm to {what}.",
        f"In words, how would a program {what}?",
        f"Which steps does a program need in order to {what}?",
        f"Explain step by step how to {what}. No code is needed.",
    )
    return Made(instruction=question, output=steps)


KINDS: Kinds = [
    ("program", 3.5, program),
    ("formula", 0.9, formula),
    ("reading", 1.8, reading),
    ("repair", 1.5, repair),
    ("explain", 1.2, explain),
    ("rewrite", 0.9, rewrite),
    ("concept", 0.4, concept),
    ("algorithm", 0.3, algorithm),
]
