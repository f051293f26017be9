"""What can go wrong with an evaluation. Each message names what is wrong and the fix.

TrainerError
  EvaluationError     rows, metrics, gates, an answer that makes no sense
    ServerError       the server refused a request
    ServerLostError   it does not answer, or not any more
"""

from lory_trainer.errors import TrainerError


class EvaluationError(TrainerError):
    pass


class ServerError(EvaluationError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerLostError(EvaluationError):
    pass
