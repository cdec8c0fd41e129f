/* An engine that answers at once, under the options of llama-server: what is measured in front of it is the gateway's. A thread
 * for each connection, which is kept open; `"stream":true` gives a chunk every millisecond that holds its time. It tells when it
 * began and when it ended. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *key;

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void tell(const char *what) {
    char line[64];
    int length = snprintf(line, sizeof line, "%s %lld\n", what, now());
    if (write(2, line, length) != length) _exit(1);
}

static void finish(int signal) {
    (void)signal;
    tell("ended");
    _exit(0);
}

static int say(int to, const char *text, size_t length) { return write(to, text, length) == (ssize_t)length; }

static int answer(int to, const char *status, const char *body) {
    char out[2048];
    int length = snprintf(out, sizeof out, "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
                          status, strlen(body), body);
    return say(to, out, length);
}

static int event(int to, const char *data) {
    char out[2048];
    int length = snprintf(out, sizeof out, "%zx\r\ndata: %s\n\n\r\n", strlen(data) + 8, data);
    return say(to, out, length);
}

#define HEAD "{\"id\":\"chatcmpl-1\",\"created\":1,\"model\":\"instant\","

static int stream(int to, int count) {
    const char *head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    char data[512];
    if (!say(to, head, strlen(head))) return 0;
    for (int at = 0; at < count; at++) {
        usleep(1000);
        snprintf(data, sizeof data, HEAD "\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,"
                 "\"delta\":{\"content\":\"%lld\"},\"finish_reason\":null}]}", now());
        if (!event(to, data)) return 0;
    }
    return event(to, HEAD "\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}")
        && event(to, HEAD "\"object\":\"chat.completion.chunk\",\"choices\":[],\"usage\":{\"prompt_tokens\":3,"
                 "\"completion_tokens\":1,\"total_tokens\":4}}")
        && event(to, "[DONE]") && say(to, "0\r\n\r\n", 5);
}

static int respond(int to, const char *head, const char *body) {
    if (!strncmp(head, "GET /health", 11)) return answer(to, "200 OK", "{\"status\":\"ok\"}");
    if (!strstr(head, key)) return answer(to, "401 Unauthorized", "{}");
    if (strncmp(head, "POST", 4)) return answer(to, "200 OK", "{}");
    if (strstr(body, "\"stream\":true")) return stream(to, 100);
    return answer(to, "200 OK", HEAD "\"object\":\"chat.completion\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
                  "\"content\":\"Paris\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1,"
                  "\"total_tokens\":4}}");
}

static void *serve(void *argument) {
    int client = (int)(intptr_t)argument, on = 1;
    char request[1 << 16];
    size_t length = 0;
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    for (;;) {
        request[length] = 0;
        char *body = strstr(request, "\r\n\r\n");
        if (body) {
            body += 4;
            char *size = strcasestr(request, "\r\ncontent-length:");
            size_t whole = body - request + (size && size < body ? strtoul(size + 17, 0, 10) : 0);
            if (length >= whole) {
                char *close = strcasestr(request, "\r\nconnection: close");
                int last = close && close < body;
                if (length > whole || !respond(client, request, body) || last) break;
                length = 0;
                continue;
            }
        }
        if (length == sizeof request - 1) break;
        ssize_t more = read(client, request + length, sizeof request - 1 - length);
        if (more <= 0) break;
        length += more;
    }
    close(client);
    return 0;
}

int main(int count, char **words) {
    tell("began");
    struct sockaddr_in address = {.sin_family = AF_INET};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int at = 1; at + 1 < count; at++)
        if (!strcmp(words[at], "--port")) address.sin_port = htons(atoi(words[at + 1]));
    key = getenv("LLAMA_API_KEY");
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, finish);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    if (!key || bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 256)) return 2;
    for (;;) {
        int client = accept(server, 0, 0);
        pthread_t thread;
        if (client >= 0 && !pthread_create(&thread, 0, serve, (void *)(intptr_t)client)) pthread_detach(thread);
    }
}
