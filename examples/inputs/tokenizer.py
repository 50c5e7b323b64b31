"""Split arithmetic expressions into tokens, and evaluate them."""

import operator
import re
from dataclasses import dataclass

TOKEN = re.compile(r"\s*(?:(\d+\.?\d*)|(.))")

OPERATORS = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
    "^": (3, operator.pow),
}


class ParseError(ValueError):
    """The expression is invalid; `position` is the index of the fault."""

    def __init__(self, message, position):
        super().__init__(f"{message} at {position}")
        self.position = position


@dataclass(frozen=True)
class Token:
    """One number, operator or parenthesis."""

    kind: str
    text: str
    position: int


def tokenize(text):
    """Return the tokens of `text`, in order."""
    tokens = []
    position = 0
    while position < len(text.rstrip()):
        match = TOKEN.match(text, position)
        number, other = match.groups()
        if number:
            tokens.append(Token("number", number, match.start(1)))
        elif other in OPERATORS:
            tokens.append(Token("operator", other, match.start(2)))
        elif other in "()":
            tokens.append(Token("paren", other, match.start(2)))
        else:
            raise ParseError(f"unexpected {other!r}", match.start(2))
        position = match.end()
    return tokens


def to_postfix(tokens):
    output, stack = [], []
    for token in tokens:
        if token.kind == "number":
            output.append(token)
        elif token.text == "(":
            stack.append(token)
        elif token.text == ")":
            while stack and stack[-1].text != "(":
                output.append(stack.pop())
            if not stack:
                raise ParseError("no opening parenthesis", token.position)
            stack.pop()
        else:
            while stack and stack[-1].text != "(" and binds_tighter(stack[-1], token):
                output.append(stack.pop())
            stack.append(token)
    while stack:
        token = stack.pop()
        if token.text == "(":
            raise ParseError("no closing parenthesis", token.position)
        output.append(token)
    return output


def binds_tighter(left, right):
    """Return whether `left` is applied before `right`."""
    if right.text == "^":
        return OPERATORS[left.text][0] > OPERATORS["^"][0]
    return OPERATORS[left.text][0] >= OPERATORS[right.text][0]


def evaluate(text):
    """Return the value of an expression such as `2 * (3 + 4) ^ 2`."""
    stack = []
    for token in to_postfix(tokenize(text)):
        if token.kind == "number":
            stack.append(float(token.text))
            continue
        if len(stack) < 2:
            raise ParseError("an operand is missing", token.position)
        right, left = stack.pop(), stack.pop()
        stack.append(OPERATORS[token.text][1](left, right))
    if len(stack) != 1:
        raise ParseError("an operator is missing", 0)
    return stack[0]
