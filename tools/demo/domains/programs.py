"""What the coding rows write: short functions with the asserts that prove them.

`ARG` stands for the argument's name, `NUM` (in prose `{N}`) for a number of the row, `FUN` for the function's name.
"""

from __future__ import annotations

Program = tuple[str, str, str, list[str], str]
"""Task in words, stem of the name, kind of argument, lines of the body, asserts."""

PROGRAMS: list[Program] = [
    ("returns the sum of a list", "total", "values", ["result = 0", "for entry in ARG:", "    result += entry", "return result"], "assert FUN([1, 2, 3]) == 6"),
    ("counts the values greater than {N}", "count_above", "values", ["return sum(1 for entry in ARG if entry > NUM)"], "assert FUN([NUM, NUM + 1, 0, 50]) == 2"),
    ("keeps the values that {N} divides", "divisible", "values", ["return [entry for entry in ARG if entry % NUM == 0]"], "assert FUN([0, 1, NUM, NUM + 1]) == [0, NUM]"),
    ("multiplies every value by {N}", "scale", "values", ["return [entry * NUM for entry in ARG]"], "assert FUN([1, 2]) == [NUM, 2 * NUM]"),
    ("adds {N} to every value", "shift", "values", ["return [entry + NUM for entry in ARG]"], "assert FUN([1, 2]) == [NUM + 1, NUM + 2]"),
    ("returns the first {N} values of a list", "first", "values", ["return ARG[:NUM]"], "assert FUN(list(range(40))) == list(range(NUM))"),
    ("returns the last {N} values of a list", "last", "values", ["return ARG[-NUM:]"], "assert FUN(list(range(40))) == list(range(40 - NUM, 40))"),
    ("returns the {N} largest values, largest first", "largest", "values", ["return sorted(ARG, reverse=True)[:NUM]"], "assert FUN(list(range(40))) == list(range(39, 39 - NUM, -1))"),
    ("returns the {N} smallest values in order", "smallest", "values", ["return sorted(ARG)[:NUM]"], "assert FUN([5, 4, 3]) == [3, 4, 5][:NUM]"),
    ("says whether {N} is in a list", "contains", "values", ["return NUM in ARG"], "assert FUN([NUM]) and not FUN([])"),
    ("counts how often {N} occurs in a list", "occurrences", "values", ["count = 0", "for entry in ARG:", "    if entry == NUM:", "        count += 1", "return count"], "assert FUN([NUM, 0, NUM]) == 2"),
    ("returns the average of a list", "mean", "values", ["return sum(ARG) / len(ARG)"], "assert FUN([1, 2, 3]) == 2"),
    ("removes duplicates and keeps the order", "unique", "values", ["seen = []", "for entry in ARG:", "    if entry not in seen:", "        seen.append(entry)", "return seen"], "assert FUN([2, 1, 2]) == [2, 1]"),
    ("returns the largest value without using max", "maximum", "values", ["best = ARG[0]", "for entry in ARG:", "    if entry > best:", "        best = entry", "return best"], "assert FUN([1, 9, 3]) == 9"),
    ("returns the difference between the largest and the smallest value", "spread", "values", ["return max(ARG) - min(ARG)"], "assert FUN([4, 9, 2]) == 7"),
    ("reverses a list without changing it", "backwards", "values", ["return ARG[::-1]"], "assert FUN([1, 2]) == [2, 1]"),
    ("cuts a list into pieces of {N} values", "pieces", "values", ["return [ARG[i : i + NUM] for i in range(0, len(ARG), NUM)]"], "assert sum(FUN(list(range(30))), []) == list(range(30))"),
    ("returns every value whose position is a multiple of {N}", "every", "values", ["return ARG[::NUM]"], "assert FUN(list(range(40)))[1] == NUM"),
    ("limits every value to at most {N}", "limit", "values", ["return [min(entry, NUM) for entry in ARG]"], "assert FUN([0, 99]) == [0, NUM]"),
    ("counts the vowels of a text", "vowels", "text", ["return sum(1 for c in ARG.lower() if c in 'aeiou')"], "assert FUN('Apple pie') == 4"),
    ("says whether a text reads the same backwards", "palindrome", "text", ["return ARG == ARG[::-1]"], "assert FUN('level') and not FUN('no')"),
    ("counts the words of a text", "words", "text", ["return len(ARG.split())"], "assert FUN('one two') == 2"),
    ("keeps the words that are longer than {N} letters", "long_words", "text", ["return [w for w in ARG.split() if len(w) > NUM]"], "assert FUN('a ' + 'b' * 20) == ['b' * 20]"),
    ("repeats a text {N} times", "repeat", "text", ["return ARG * NUM"], "assert FUN('ab') == 'ab' * NUM"),
    ("returns the first {N} characters of a text", "shorten", "text", ["return ARG[:NUM]"], "assert len(FUN('x' * 30)) == NUM"),
    ("writes every word of a text with a large first letter", "title", "text", ["return ' '.join(w.capitalize() for w in ARG.split())"], "assert FUN('ab cd') == 'Ab Cd'"),
    ("counts how often each letter occurs in a text", "letters", "text", ["counts = {}", "for c in ARG:", "    counts[c] = counts.get(c, 0) + 1", "return counts"], "assert FUN('aab') == {'a': 2, 'b': 1}"),
    ("replaces the spaces of a text by dashes", "dashes", "text", ["return ARG.replace(' ', '-')"], "assert FUN('a b') == 'a-b'"),
    ("removes the digits from a text", "no_digits", "text", ["return ''.join(c for c in ARG if not c.isdigit())"], "assert FUN('a1b') == 'ab'"),
    ("returns the longest word of a text", "longest", "text", ["return max(ARG.split(), key=len)"], "assert FUN('a bbb cc') == 'bbb'"),
    ("says whether a number is even", "even", "n", ["return ARG % 2 == 0"], "assert FUN(4) and not FUN(5)"),
    ("says whether {N} divides a number", "divides", "n", ["return ARG % NUM == 0"], "assert FUN(2 * NUM) and not FUN(NUM + 1)"),
    ("returns the factorial of a number", "factorial", "n", ["if ARG <= 1:", "    return 1", "result = 1", "for i in range(2, ARG + 1):", "    result *= i", "return result"], "assert FUN(5) == 120"),
    ("says whether a number is prime", "prime", "n", ["if ARG < 2:", "    return False", "for d in range(2, ARG):", "    if ARG % d == 0:", "        return False", "return True"], "assert FUN(13) and not FUN(15)"),
    ("returns the digits of a number added up", "digit_sum", "n", ["return sum(int(d) for d in str(ARG))"], "assert FUN(123) == 6"),
    ("returns the multiples of {N} up to a number", "multiples", "n", ["return list(range(NUM, ARG + 1, NUM))"], "assert FUN(3 * NUM) == [NUM, 2 * NUM, 3 * NUM]"),
    ("returns a number raised to the power of {N}", "power", "n", ["return ARG ** NUM"], "assert FUN(2) == 2 ** NUM"),
    ("counts down from a number to zero in a list", "countdown", "n", ["return list(range(ARG, -1, -1))"], "assert FUN(2) == [2, 1, 0]"),
    ("returns the first Fibonacci numbers, as many as asked", "fibonacci", "n", ["a, b, result = 0, 1, []", "for _ in range(ARG):", "    result.append(a)", "    a, b = b, a + b", "return result"], "assert FUN(6) == [0, 1, 1, 2, 3, 5]"),
    ("returns the divisors of a number", "divisors", "n", ["return [d for d in range(1, ARG + 1) if ARG % d == 0]"], "assert FUN(6) == [1, 2, 3, 6]"),
    ("returns the squares up to a number of terms", "squares", "n", ["return [i * i for i in range(1, ARG + 1)]"], "assert FUN(3) == [1, 4, 9]"),
]  # fmt: skip

Formula = tuple[str, str, str, str, str]
"""What is calculated, stem of the name, arguments, expression, asserts."""

FORMULAS: list[Formula] = [
    ("the area of a rectangle from its sides", "area", "width, height", "width * height", "assert FUN(3, 4) == 12"),
    ("the perimeter of a rectangle from its sides", "perimeter", "width, height", "2 * (width + height)", "assert FUN(3, 4) == 14"),
    ("the area of a circle from its radius", "circle", "radius", "3.141592653589793 * radius ** 2", "assert abs(FUN(2) - 12.566370614) < 1e-6"),
    ("the average of three numbers", "average", "a, b, c", "(a + b + c) / 3", "assert FUN(1, 2, 3) == 2"),
    ("how much a percentage of an amount is", "percent", "amount, share", "amount * share / 100", "assert FUN(200, 10) == 20"),
    ("the price after a discount in percent", "discount", "price, share", "price * (100 - share) / 100", "assert FUN(200, 10) == 180"),
    ("the speed from a distance and a time", "speed", "distance, hours", "distance / hours", "assert FUN(100, 4) == 25"),
    ("the hypotenuse of a right triangle from its legs", "hypotenuse", "a, b", "(a ** 2 + b ** 2) ** 0.5", "assert FUN(3, 4) == 5"),
    ("degrees Fahrenheit from degrees Celsius", "fahrenheit", "celsius", "celsius * 9 / 5 + 32", "assert FUN(100) == 212"),
    ("the number of seconds in some hours and minutes", "seconds", "hours, minutes", "hours * 3600 + minutes * 60", "assert FUN(1, 1) == 3660"),
    ("the sum of the whole numbers from 1 to n", "series", "n", "n * (n + 1) // 2", "assert FUN(4) == 10"),
    ("the remainder of a division", "remainder", "a, b", "a % b", "assert FUN(7, 3) == 1"),
    ("the distance between two numbers", "distance", "a, b", "abs(a - b)", "assert FUN(2, 7) == 5"),
    ("the volume of a box from its three sides", "volume", "a, b, c", "a * b * c", "assert FUN(2, 3, 4) == 24"),
    ("the simple interest on an amount", "interest", "amount, rate, years", "amount * rate * years / 100", "assert FUN(100, 5, 2) == 10"),
]  # fmt: skip
