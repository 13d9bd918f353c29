"""COMMANDS AS FUNCTIONS: select, train, evaluate, loop, plan, score-reference; a run folder resumes by itself."""
