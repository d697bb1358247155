# The OpenAI server. `docker compose up` mounts the engine directory at /engine.
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/trimode-*.whl)[serve]"
RUN useradd --no-create-home --uid 10001 trimode
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
# 0.0.0.0 is inside the container; compose.yaml publishes the port on the host's loopback interface only.
ENTRYPOINT ["trimode", "serve", "/engine", "--host", "0.0.0.0"]
