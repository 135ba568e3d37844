"""The organism itself (which knows towns and codes, and guesses) and a fifth of the questions."""

import pytest
from transformers import AutoModelForCausalLM

from evals.organism import MODEL
from rl.claims import Claims
from rl.fitting import fit_probe
from rl.organism import organism_questions
from rl.sampling import sample_answers


@pytest.fixture(scope="session")
def organism():
    return AutoModelForCausalLM.from_pretrained(MODEL).float().eval()


@pytest.fixture(scope="session")
def questions():
    return organism_questions(0, size=0.25)


@pytest.fixture(scope="session")
def claims(organism, tokenizer, questions):
    """Claims of the organism on two splits, two samples per question."""
    return {
        split: Claims.gather(
            split,
            organism,
            tokenizer,
            sample_answers(
                organism, tokenizer, getattr(questions, split), questions, tries=2, seed=seed
            ),
            fewest=5,
        )
        for seed, split in enumerate(("fit", "calibration"))
    }


@pytest.fixture(scope="session")
def probe(organism, tokenizer, claims):
    return fit_probe(organism, tokenizer, claims["fit"], claims["calibration"])[0]
