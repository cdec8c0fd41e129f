/* As much of llama-server as `aitools run` talks to: it is ready at once, and streams one answer. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void say(int to, const char *text) { if (write(to, text, strlen(text)) < 0) exit(1); }

int main(int count, char **args) {
    static char request[1 << 16];
    int port = 0;
    for (int at = 1; at + 1 < count; at++)
        if (!strcmp(args[at], "--port")) port = atoi(args[at + 1]);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int server = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(server, (struct sockaddr *)&address, sizeof address) || listen(server, 8)) return 2;
    for (;;) {
        int client = accept(server, 0, 0);
        size_t length = 0, want = 0;
        char *body = 0;
        for (;;) {
            ssize_t more = read(client, request + length, sizeof request - 1 - length);
            if (more <= 0) break;
            length += more;
            request[length] = 0;
            char *end = strstr(request, "\r\n\r\n"), *size = strstr(request, "ontent-length: ");
            if (end) { body = end + 4; want = size && size < end ? strtoul(size + 15, 0, 10) : 0; }
            if (body && strlen(body) >= want) break;
        }
        if (!length || !body) { close(client); continue; }
        if (!strstr(request, getenv("LLAMA_API_KEY"))) say(client, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
        else if (!strstr(request, "/chat/")) say(client, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        else {
            say(client, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n");
            say(client, "data: {\"choices\":[{\"delta\":{\"content\":\"Paris\"}}]}\n\n");
            say(client, "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n");
            say(client, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1}}\n\ndata: [DONE]\n\n");
        }
        close(client);
    }
}
