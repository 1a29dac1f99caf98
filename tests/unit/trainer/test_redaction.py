"""Secrets in what is shown, in the shapes that libraries print them in."""

import pytest

from trainer.redaction import redacted, without_values


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:hunter2@bucket/text", "s3://(redacted)@bucket/text"),
        ("https://host/a?sig=hunter2&b=1", "https://host/a?sig=(redacted)&b=1"),
        ("  api_key: hunter2", "  api_key: (redacted)"),
        ("WANDB_API_KEY=hunter2", "WANDB_API_KEY=(redacted)"),
        ("with WANDB_API_KEY=hunter2, and again", "with WANDB_API_KEY=(redacted), and again"),
        ("login(api_key='a', password=hunter2)", "login(api_key='(redacted)', password=(redacted))"),
        ("Authorization: Bearer hunter2", "Authorization: Bearer (redacted)"),
        ("{'authorization': 'Basic aHVudGVyMg=='}", "{'authorization': 'Basic (redacted)'}"),
        ("refused: bearer hunter2", "refused: bearer (redacted)"),
        ("Authorization: hunter2", "Authorization: (redacted)"),
    ],
)
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text", ["num_tokens=512", "tokens_per_s: 3", "https://host/a?b=1", "403: authorization failed for me", "a basic rule", "if token == last:"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_the_environment_are_left_out_wherever_they_stand() -> None:
    environment = {
        "WANDB_API_KEY": "hunter2",
        "MY_SECRET": "hunter2-and-more",
        "TOKENIZERS_PARALLELISM": "falsely",
        "HF_TOKEN": "a",
        "HOME": "/root/me",
    }
    text = "key hunter2 (not hunter2-and-more) of /root/me is falsely a key"
    assert without_values(text, environment) == "key (redacted) (not (redacted)) of /root/me is falsely a key"
